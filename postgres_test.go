package main

// postgres_test.go is how connection strings are understood, as tables, and what
// comes of them on a PostgreSQL that wants TLS and passwords.

import (
	"bytes"
	"cmp"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"database/sql/driver"
	"encoding/binary"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/user"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/lib/pq"
	"github.com/lib/pq/pqerror"
)

// clearEnvironment takes away what libpq would read, for the time of a test that
// is not parallel to others.
func clearEnvironment(t *testing.T) {
	for _, variable := range os.Environ() {
		if name, _, _ := strings.Cut(variable, "="); strings.HasPrefix(name, "PG") {
			t.Setenv(name, "") // puts it back afterwards
			os.Unsetenv(name)
		}
	}
}

func TestParseURL(t *testing.T) {
	clearEnvironment(t)
	const (
		neon = "postgresql://alex:AbC123dEf@ep-cool-darkness-a1b2c3d4-pooler.us-east-2.aws.neon.tech/dbname?sslmode=require&channel_binding=require"
		host = "ep-cool-darkness-a1b2c3d4-pooler.us-east-2.aws.neon.tech"
	)
	for _, test := range []struct {
		name string
		url  string
		env  string // a variable of libpq's
		want string // hosts, sslmode, sslrootcert and settings of the server
	}{
		{"Neon", neon, "", host + ":5432 verify-full system map[]"},
		{"Neon, direct", strings.Replace(neon, "-pooler", "", 1), "", strings.Replace(host, "-pooler", "", 1) + ":5432 verify-full system map[]"},
		{"Neon, keywords", "host=" + host + " user=alex password=AbC123dEf dbname=dbname sslmode=require channel_binding=require", "", host + ":5432 verify-full system map[]"},

		{"nothing", "", "", "localhost:5432 disable  map[]"},
		{"no host", "dbname=a", "", "localhost:5432 disable  map[]"},
		{"no host in a URL", "postgres:///a", "", "localhost:5432 disable  map[]"},
		{"socket", "host=/run/postgresql", "", "/run/postgresql:5432 disable  map[]"},
		{"socket in a URL", "postgres:///a?host=/run/postgresql", "", "/run/postgresql:5432 disable  map[]"},
		{"abstract socket", "host=@a", "", "@a:5432 disable  map[]"},
		{"socket, TLS asked for", "host=/run/postgresql sslmode=require", "", "/run/postgresql:5432 disable  map[]"},
		{"localhost", "postgres://alice@localhost:5433/a", "", "localhost:5433 disable  map[]"},
		{"127.0.0.2", "host=127.0.0.2", "", "127.0.0.2:5432 disable  map[]"},
		{"::1", "host=::1", "", "::1:5432 disable  map[]"},
		{"::1 in a URL", "postgres://[::1]:5433/a", "", "::1:5433 disable  map[]"},
		{"::1 in a URL, no port", "postgres://[::1]/a", "", "::1:5432 disable  map[]"},
		{"127.0.0.1 as IPv6", "host=::ffff:127.0.0.1", "", "::ffff:127.0.0.1:5432 disable  map[]"},
		{"loopback address of a name", "host=db.example.com hostaddr=127.0.0.1", "", "db.example.com/127.0.0.1:5432 disable  map[]"},
		{"other address of localhost", "host=localhost hostaddr=192.0.2.1", "", "localhost/192.0.2.1:5432 require  map[]"},
		{"address alone", "hostaddr=192.0.2.1", "", "localhost/192.0.2.1:5432 require  map[]"},
		{"any address", "host=0.0.0.0", "", "0.0.0.0:5432 require  map[]"},
		{"remote", "postgres://alice@db.example.com/a", "", "db.example.com:5432 require  map[]"},
		{"name that begins like localhost", "host=localhost.example.com", "", "localhost.example.com:5432 require  map[]"},
		{"several loopback hosts", "host=localhost,127.0.0.1 port=1,2", "", "localhost:1 127.0.0.1:2 disable  map[]"},
		{"several hosts, one remote", "host=localhost,db.example.com", "", "localhost:5432 db.example.com:5432 require  map[]"},
		{"several hosts, one absent", "host=localhost, port=1", "", "localhost:1 localhost:1 disable  map[]"},
		{"several hosts in a URL, their ports", "postgres://alice@a.example:1,b.example:2/a", "", "a.example:1 b.example:2 require  map[]"},
		{"several hosts in a URL", "postgres://alice@a.example,b.example/a?port=1,2", "", "a.example:1 b.example:2 require  map[]"},

		{"sslmode given, loopback", "host=localhost sslmode=prefer", "", "localhost:5432 prefer  map[]"},
		{"sslmode given, remote", "postgres://db.example.com/a?sslmode=disable", "", "db.example.com:5432 disable  map[]"},
		{"sslrootcert=system", "host=localhost sslrootcert=system", "", "localhost:5432 verify-full system map[]"},
		{"PGSSLMODE", "host=localhost", "PGSSLMODE=verify-ca", "localhost:5432 verify-ca  map[]"},
		{"PGSSLMODE, sslmode given", "host=localhost sslmode=require", "PGSSLMODE=verify-ca", "localhost:5432 require  map[]"},
		{"PGHOST", "dbname=a", "PGHOST=db.example.com", "db.example.com:5432 require  map[]"},
		{"PGHOST, host given", "host=localhost", "PGHOST=db.example.com", "localhost:5432 disable  map[]"},
		{"PGPORT", "postgres://db.example.com/a", "PGPORT=5433", "db.example.com:5433 require  map[]"},

		{"channel_binding=prefer", "host=localhost channel_binding=prefer", "", "localhost:5432 disable  map[]"},
		{"channel_binding=disable", "postgres://db.example.com/a?channel_binding=disable", "", "db.example.com:5432 require  map[]"},
		{"channel_binding, no sslmode", "host=localhost channel_binding=require", "", "localhost:5432 verify-full system map[]"},
		{"channel_binding, verify-ca", "host=localhost channel_binding=require sslmode=verify-ca", "", "localhost:5432 verify-full system map[]"},
		{"channel_binding, prefer", "host=localhost channel_binding=require sslmode=prefer", "", "localhost:5432 verify-full system map[]"},
		{"channel_binding, sslrootcert", "host=localhost channel_binding=require sslrootcert=ca.crt", "", "localhost:5432 verify-full ca.crt map[]"},
		{"channel_binding, PGSSLROOTCERT", "host=localhost channel_binding=require", "PGSSLROOTCERT=ca.crt", "localhost:5432 verify-full ca.crt map[]"},

		{"binary_parameters=no", "host=localhost binary_parameters=no", "", "localhost:5432 disable  map[]"},
		{"settings of the server", "postgres://localhost/a?search_path=b&my.setting=c", "", "localhost:5432 disable  map[my.setting:c search_path:b]"},
	} {
		t.Run(test.name, func(t *testing.T) {
			if name, value, ok := strings.Cut(test.env, "="); ok {
				t.Setenv(name, value)
			}
			cfg, err := parseURL(test.url)
			if err != nil {
				t.Fatal(err)
			}
			got := ""
			for _, h := range append([]pq.ConfigMultihost{{Host: cfg.Host, Hostaddr: cfg.Hostaddr, Port: cfg.Port}}, cfg.Multi...) {
				if h.Hostaddr.IsValid() {
					h.Host += "/" + h.Hostaddr.String()
				}
				got += fmt.Sprintf("%s:%d ", h.Host, h.Port)
			}
			got += fmt.Sprintf("%s %s %v", cfg.SSLMode, cfg.SSLRootCert, cfg.Runtime)
			if got != test.want {
				t.Errorf("got  %s\nwant %s", got, test.want)
			}
			if !cfg.BinaryParameters {
				t.Error("no binary_parameters")
			}
		})
	}
}

func TestParseURLErrors(t *testing.T) {
	clearEnvironment(t)
	const syntax = "neither a URL nor keywords"
	for _, test := range []struct {
		name string
		url  string
		env  string
		want string // in the error
	}{
		{"word", "s3cret", "", syntax},
		{"unterminated quote", "password='s3cret", "", syntax},
		{"unquoted space", "password=my s3cret", "", syntax},
		{"slash in a password", "postgres://alice:s3cret/x@localhost/a", "", syntax},
		{"percent in a password", "postgres://alice:s3%cret@localhost/a", "", syntax},
		{"name for a port", "postgres://alice:s3cret@localhost:port/a", "", syntax},
		{"URL of SQLAlchemy", "postgresql+psycopg2://alice:s3cret@localhost/a", "", syntax},
		{"URL of SQLAlchemy with a setting", "postgresql+psycopg2://alice:s3cret@localhost/a?sslmode=require", "", syntax},
		{"URL in quotes", `"postgres://alice:s3cret@localhost/a?sslmode=require"`, "", syntax},
		{"space before a URL", " postgres://alice:s3cret@localhost/a?sslmode=require", "", syntax},
		{"command", "psql 'postgres://alice:s3cret@localhost/a?sslmode=require'", "", syntax},
		{"port", "postgres://alice:s3cret@localhost:65536/a", "", "port"},
		{"sslmode", "password=s3cret sslmode=no", "", "sslmode"},
		{"hostaddr", "password=s3cret hostaddr=localhost", "", "hostaddr"},
		{"sslrootcert=system and a weaker sslmode", "password=s3cret sslrootcert=system sslmode=require", "", "sslmode"},
		{"PGSSLMODE", "password=s3cret", "PGSSLMODE=no", "PGSSLMODE"},
		{"PGCHANNELBINDING", "password=s3cret", "PGCHANNELBINDING=require", "PGCHANNELBINDING"},
		{"channel_binding", "password=s3cret channel_binding=yes", "", "channel_binding"},
		{"channel_binding, sslmode=disable", "host=db.example.com password=s3cret channel_binding=require sslmode=disable", "", "channel_binding"},
		{"channel_binding, socket", "host=/run/postgresql password=s3cret channel_binding=require", "", "channel_binding"},
		{"socket and remote host", "host=/run/postgresql,db.example.com password=s3cret sslmode=verify-full", "", "socket"},
	} {
		t.Run(test.name, func(t *testing.T) {
			if name, value, ok := strings.Cut(test.env, "="); ok {
				t.Setenv(name, value)
			}
			db, err := OpenDB(test.url)
			if err == nil {
				db.Close()
				t.Fatal("no error")
			}
			if !strings.Contains(err.Error(), test.want) || strings.Contains(err.Error(), "s3cret") {
				t.Errorf("%v, want %q", err, test.want)
			}
		})
	}
}

func TestTransient(t *testing.T) {
	t.Parallel()
	state := func(code, message string) error {
		return fmt.Errorf("while testing: %w", &pq.Error{Code: pqerror.Code(code), Message: message})
	}
	connect := func(err error) error { return fmt.Errorf("while testing: %w", &connectError{err}) }
	refused := &net.OpError{Op: "dial", Net: "tcp", Err: os.NewSyscallError("connect", errors.New("connection refused"))}
	for _, test := range []struct {
		name string
		err  error
		want bool
	}{
		{"nil", nil, false},
		{"defect", errors.New("defect"), false},
		{"EOF of something else", io.EOF, false},
		{"refused", connect(refused), true},
		{"no such host", connect(&net.OpError{Op: "dial", Err: &net.DNSError{Err: "no such host", IsNotFound: true}}), true},
		{"EOF while connecting", connect(io.EOF), true},
		{"closed while connecting", connect(io.ErrUnexpectedEOF), true},
		{"bad connection", driver.ErrBadConn, true},
		{"unknown outcome", fmt.Errorf("%w (EOF)", errUnknownOutcome), true},
		{"deadline", context.DeadlineExceeded, true},
		{"standby of several hosts", connect(errors.New("server is in hot standby mode")), true},
		{"one of several hosts is starting", connect(fmt.Errorf("pq: could not connect to any of the hosts:\n%w", errors.Join(refused, state("57P03", "the database system is starting up")))), true},
		{"all of several hosts refuse", connect(fmt.Errorf("pq: could not connect to any of the hosts:\n%w", errors.Join(refused, refused))), true},
		{"read-only one of several hosts", connect(errors.New("session is read-only")), true},
		{"no TLS", connect(pq.ErrSSLNotSupported), false},
		{"no TLS on a host called so", connect(fmt.Errorf("pq: could not connect to any of the hosts:\nconnecting to db-standby.read-only:5432: %w", pq.ErrSSLNotSupported)), false},
		{"alert of TLS", connect(&net.OpError{Op: "remote error", Err: tls.AlertError(70)}), false},
		{"untrusted", connect(&tls.CertificateVerificationError{Err: x509.UnknownAuthorityError{}}), false},
		{"untrusted, verify-ca", connect(x509.UnknownAuthorityError{}), false},
		{"expired, verify-ca", connect(x509.CertificateInvalidError{Reason: x509.Expired}), false},
		{"no file", connect(&fs.PathError{Op: "open", Path: "ca.crt", Err: fs.ErrNotExist}), false},
		{"no certificate in the file", connect(errors.New("pq: couldn't parse pem from sslrootcert")), false},
		{"key readable by others", connect(pq.ErrSSLKeyHasWorldPermissions), false},
		{"method of authentication", connect(errors.New("pq: unsupported authentication method: KerberosV5 (2)")), false},
		{"connection_failure", state("08006", ""), true},
		{"protocol_violation, as from PgBouncer", state("08P01", "server login has been failing"), true},
		{"setting that PgBouncer refuses", state("08P01", "unsupported startup parameter: search_path"), false},
		{"read_only_sql_transaction", state("25006", ""), true},
		{"invalid_password", connect(state("28P01", "")), false},
		{"invalid_authorization_specification", connect(state("28000", "")), false},
		{"invalid_catalog_name", connect(state("3D000", "")), false},
		{"serialization_failure", state("40001", ""), true},
		{"deadlock_detected", state("40P01", ""), true},
		{"insufficient_privilege", state("42501", ""), false},
		{"undefined_object, as an unknown setting", connect(state("42704", "")), false},
		{"undefined_table", state("42P01", ""), false},
		{"unique_violation", state("23505", ""), false},
		{"disk_full", state("53100", ""), true},
		{"too_many_connections", connect(state("53300", "")), true},
		{"lock_not_available", state("55P03", ""), true},
		{"object_in_use", state("55006", ""), false},
		{"query_canceled", state("57014", ""), true},
		{"admin_shutdown", state("57P01", ""), true},
		{"cannot_connect_now", connect(state("57P03", "")), true},
		{"io_error", state("58030", ""), true},
		{"internal_error", state("XX000", ""), false},
	} {
		if got := transient(test.err); got != test.want {
			t.Errorf("%s (%v): %t, want %t", test.name, test.err, got, test.want)
		}
	}
}

// A statement and its parameters are one batch: they end with the first Sync.
func TestOneBatch(t *testing.T) {
	t.Parallel()
	var sent recording
	listener := listen(t, "127.0.0.1:0")
	dbURL := newDatabase(t)
	relay(t, listener, dbURL, &sent)
	db := open(t, onTCP(dbURL, listener.Addr()))
	defer db.Close()
	if err := db.Ping(); err != nil {
		t.Fatal(err)
	}
	before := sent.messages()
	var got string
	if err := db.QueryRow("SELECT $1::text", "parameter").Scan(&got); err != nil || got != "parameter" {
		t.Fatalf("%q, %v", got, err)
	}
	batch := strings.TrimPrefix(sent.messages(), before)
	if strings.Count(batch, "S") != 1 || strings.Count(batch, "B") != 1 || !strings.HasSuffix(batch, "S") {
		t.Errorf("the messages were %q", batch)
	}
}

// relay forwards what comes on a listener to the PostgreSQL at the socket of
// dbURL, and returns the URL for it. Each client's bytes are shown to seen first.
func relay(t testing.TB, listener net.Listener, dbURL string, seen io.Writer) {
	cfg, err := parseURL(dbURL)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	go func() {
		for {
			client, err := listener.Accept()
			if err != nil {
				return
			}
			server, err := net.Dial("unix", fmt.Sprintf("%s/.s.PGSQL.%d", cfg.Host, cfg.Port))
			if err != nil {
				client.Close()
				continue
			}
			go func() { io.Copy(client, server); client.Close() }()
			go func() { io.Copy(io.MultiWriter(seen, server), client); server.Close() }()
		}
	}()
}

// onTCP returns dbURL with the address of a listener in place of the socket.
func onTCP(dbURL string, addr net.Addr) string {
	host, port, _ := net.SplitHostPort(addr.String())
	dbURL = regexp.MustCompile("host=[^ ]*").ReplaceAllString(dbURL, "host="+host)
	return regexp.MustCompile("port=[^ ]*").ReplaceAllString(dbURL, "port="+port)
}

// recording is what one client of PostgreSQL has sent.
type recording struct {
	mu   sync.Mutex
	sent bytes.Buffer
}

func (r *recording) Write(p []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.sent.Write(p)
}

// messages returns the types of the messages after the first, which has none.
func (r *recording) messages() (types string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	rest := r.sent.Bytes()
	rest = rest[binary.BigEndian.Uint32(rest):]
	for len(rest) > 0 {
		types += string(rest[0])
		rest = rest[1+binary.BigEndian.Uint32(rest[1:]):]
	}
	return types
}

// A secureServer is a PostgreSQL on 127.0.0.1 that asks for passwords and has a
// certificate for localhost. Its role alice, whose password is s3cret, has the
// database app.
type secureServer struct {
	*localDB
	port  int
	roots string // file of the certificate that has signed the server's
	other string // file of another
}

func newSecureServer(t *testing.T) *secureServer {
	t.Helper()
	dir, err := os.MkdirTemp("", "tasks-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	s := &secureServer{roots: filepath.Join(dir, "roots.crt"), other: filepath.Join(dir, "other.crt")}
	roots, rootsKey := certificate(t, nil, nil)
	other, _ := certificate(t, nil, nil)
	cert, key := certificate(t, roots, rootsKey)
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	pemOf := func(kind string, der []byte) []byte { return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}) }
	for name, content := range map[string][]byte{
		s.roots:                              pemOf("CERTIFICATE", roots.Raw),
		s.other:                              pemOf("CERTIFICATE", other.Raw),
		filepath.Join(dir, "server.crt"):     pemOf("CERTIFICATE", cert.Raw),
		filepath.Join(dir, "server.key"):     pemOf("PRIVATE KEY", der),
		filepath.Join(dir, "pg_hba.conf"):    []byte("local all postgres trust\nhost all all 127.0.0.1/32 scram-sha-256\n"),
		filepath.Join(dir, "not-a-cert.crt"): []byte("not a certificate\n"),
	} {
		if err := os.WriteFile(name, content, 0o600); err != nil {
			t.Fatal(err)
		}
		if account, err := user.Lookup(localAccount); err == nil && os.Geteuid() == 0 {
			uid, _ := strconv.Atoi(account.Uid)
			os.Chown(name, uid, -1)
		}
	}
	for range 3 { // another process may take the port first
		listener := listen(t, "127.0.0.1:0")
		listener.Close()
		s.port = listener.Addr().(*net.TCPAddr).Port
		s.localDB, err = startLocalDB(t.Context(), dir, os.Getenv("PG_BIN"), "fsync=off", "full_page_writes=off",
			"listen_addresses=127.0.0.1", fmt.Sprintf("port=%d", s.port), "hba_file="+filepath.Join(dir, "pg_hba.conf"),
			"ssl=on", "ssl_cert_file="+filepath.Join(dir, "server.crt"), "ssl_key_file="+filepath.Join(dir, "server.key"))
		if err == nil {
			break
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Stop(); err != nil {
			t.Error(err)
		}
	})
	execSQL(t, s.URL, "CREATE ROLE alice LOGIN PASSWORD 's3cret'")
	execSQL(t, s.URL, "CREATE DATABASE app OWNER alice")
	return s
}

// certificate returns a certificate for localhost that is signed by another or,
// without one, a certificate that can sign others.
func certificate(t *testing.T, parent *x509.Certificate, parentKey *ecdsa.PrivateKey) (*x509.Certificate, *ecdsa.PrivateKey) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		Subject:      pkix.Name{CommonName: "localhost"},
		DNSNames:     []string{"localhost"},
		NotBefore:    time.Now().Add(-time.Hour),
		NotAfter:     time.Now().Add(time.Hour),
	}
	if parent == nil {
		template.IsCA, template.BasicConstraintsValid = true, true
		template.Subject.CommonName = "authority " + rand.Text()
		template.DNSNames, parent, parentKey = nil, template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, parentKey)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert, key
}

// A start on a PostgreSQL that is protected succeeds, with TLS where that is
// due, or fails without a second try and without naming a password.
func TestSecureServer(t *testing.T) {
	t.Parallel()
	s := newSecureServer(t)
	notACert := filepath.Join(filepath.Dir(s.roots), "not-a-cert.crt")
	for i, test := range []struct {
		name string
		url  string
		want string // "plain", "TLS" or what the error has
	}{
		{"loopback", "host=127.0.0.1", "plain"},
		{"another address", "host=0.0.0.0", "TLS"},
		{"several hosts", "host=127.0.0.1,0.0.0.0", "TLS"},
		{"require, untrusted", "host=localhost sslmode=require", "TLS"},
		{"verify-ca", "host=127.0.0.1 sslmode=verify-ca sslrootcert=" + s.roots, "TLS"},
		{"verify-ca, untrusted", "host=127.0.0.1 sslmode=verify-ca sslrootcert=" + s.other, "unknown authority"},
		{"verify-full", "host=localhost sslmode=verify-full sslrootcert=" + s.roots, "TLS"},
		{"channel_binding", "host=localhost channel_binding=require sslrootcert=" + s.roots, "TLS"},
		{"channel_binding in a URL", "postgres://alice:s3cret@localhost:PORT/app?sslmode=require&channel_binding=require&sslrootcert=" + s.roots, "TLS"},
		{"channel_binding, untrusted", "host=localhost channel_binding=require sslrootcert=" + s.other, "unknown authority"},
		{"channel_binding, roots of the system", "host=localhost sslmode=require channel_binding=require", "unknown authority"},
		{"channel_binding, another host", "host=127.0.0.1 channel_binding=require sslrootcert=" + s.roots, "127.0.0.1"},
		{"no such file", "host=localhost sslmode=verify-full sslrootcert=" + s.roots + "x", "no such file"},
		{"no certificate", "host=localhost sslmode=verify-full sslrootcert=" + notACert, "sslrootcert"},
		{"wrong password", "host=localhost password=s3cret2", `password authentication failed for user "alice"`},
		{"wrong password, TLS", "host=localhost password=s3cret2 sslmode=require", `password authentication failed for user "alice"`},
		{"no password", "host=localhost password=''", "password"},
		{"unknown role", "host=localhost user=bob", `user "bob"`},
		{"unknown database", "host=localhost dbname=unknown", `database "unknown" does not exist`},
		{"unknown database in a URL", "postgres://alice:s3cret@localhost:PORT/unknown", `database "unknown" does not exist`},
		{"unknown setting", "host=localhost foo=bar", `"foo"`},
		{"unknown setting in a URL", "postgres://alice:s3cret@localhost:PORT/app?foo=bar", `"foo"`},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			name := fmt.Sprint("test", i)
			url := fmt.Sprintf("port=%d user=alice password=s3cret dbname=app application_name=%s %s", s.port, name, test.url)
			if path, query, ok := strings.Cut(test.url, "?"); strings.HasPrefix(path, "postgres:") {
				url = strings.Replace(path, "PORT", strconv.Itoa(s.port), 1) + "?application_name=" + name
				if ok {
					url += "&" + query
				}
			}
			db := open(t, url)
			defer db.Close()
			err := NewStore(db).Migrate(t.Context())
			if test.want == "plain" || test.want == "TLS" {
				var encrypted bool
				err := cmp.Or(err, db.QueryRow("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()").Scan(&encrypted))
				if err != nil || encrypted != (test.want == "TLS") {
					t.Errorf("TLS %t, %v", encrypted, err)
				}
			} else if err == nil || errors.Is(err, ErrUnavailable) || !strings.Contains(err.Error(), test.want) || strings.Contains(err.Error(), "s3cret") {
				t.Errorf("%v, want %q", err, test.want)
			}
		})
	}
}

// sslmode=require is not content with a server that has no TLS.
func TestServerWithoutTLS(t *testing.T) {
	t.Parallel()
	listener := listen(t, "127.0.0.1:0")
	dbURL := newDatabase(t)
	relay(t, listener, dbURL, io.Discard)
	url := strings.Replace(onTCP(dbURL, listener.Addr()), "sslmode=disable", "sslmode=require", 1)
	_, err := applySchema(t, url)
	if err == nil || errors.Is(err, ErrUnavailable) || !strings.Contains(err.Error(), "SSL is not enabled on the server") {
		t.Error(err)
	}
}

// Of several hosts one that is silent, as after a loss of power, delays each
// connection, but not until the request's deadline.
func TestSilentHost(t *testing.T) {
	t.Parallel()
	silent, answering := listen(t, "127.0.0.1:0"), listen(t, "127.0.0.1:0") // nobody accepts from silent
	defer silent.Close()
	dbURL := newDatabase(t)
	relay(t, answering, dbURL, io.Discard)
	url := onTCP(dbURL, answering.Addr())
	url = strings.Replace(url, "host=", "host=127.0.0.1,", 1)
	url = strings.Replace(url, "port=", fmt.Sprintf("port=%d,", silent.Addr().(*net.TCPAddr).Port), 1)
	a := newAPIOn(t, url, Options{})
	together(3, func(int) { a.create(`{"title": "a"}`) }) // more than the connection of the start
}

// A database that refuses connections to a running service is a database that is
// away, for whatever reason.
func TestRefusedConnections(t *testing.T) {
	t.Parallel()
	a := newAPIOn(t, newDatabase(t), Options{})
	a.log.expected.Store(true)
	name := regexp.MustCompile("dbname=([^ ]*)").FindStringSubmatch(a.dbURL)[1]
	allow := func(whether bool) {
		execSQL(t, testServer.URL, fmt.Sprintf("ALTER DATABASE %s ALLOW_CONNECTIONS %t", name, whether))
	}
	allow(false)
	execSQL(t, testServer.URL, "SELECT pg_terminate_backend(pid, 30000) FROM pg_stat_activity WHERE datname = $1", name)
	a.want(http.StatusServiceUnavailable, a.do("GET", "/readyz", ""))
	a.want(http.StatusServiceUnavailable, a.do("GET", "/api/tasks", ""))
	a.want(http.StatusServiceUnavailable, a.do("POST", "/api/tasks", `{"title": "a"}`))
	allow(true)
	a.want(http.StatusOK, a.do("GET", "/readyz", ""))
	a.create(`{"title": "a"}`)
}

package main

// postgres_test.go is how connection strings are understood, as tables, and what
// comes of them on a PostgreSQL that wants TLS and passwords.

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"database/sql"
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
	"os/exec"
	"os/user"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
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

// Strings that mean the same, as libpq reads them.
func TestParseURLAsLibpq(t *testing.T) {
	clearEnvironment(t)
	file := filepath.Join(t.TempDir(), "services")
	if err := os.WriteFile(file, []byte(`
# user=comment
[other]
user=other
[ prod ]
host=prod.example.com
hostaddr = 192.0.2.1
port=6543
user=bob
password = s3cret
sslmode=disable
[last]
user=last
`), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct{ name, given, env, same string }{
		{"socket", "postgres://alice@%2Frun%2Fpg:5433/a", "", "user=alice host=/run/pg port=5433 dbname=a"},
		{"several hosts", "postgres://alice@a:1,b:2/c", "", "user=alice host=a,b port=1,2 dbname=c"},
		{"several hosts, one port", "postgres://alice@a,[::1]:2,/c", "", "user=alice host=a,::1, port=5432,2, dbname=c"},
		{"IPv6 with a zone", "postgres://alice@[fe80::1%25eth0]:1", "", "user=alice host=fe80::1%eth0 port=1"},
		{"white space around", "\n postgresql://alice@localhost/a\r\n", "", "user=alice host=localhost dbname=a"},
		{"white space around keywords", "\tuser = alice\nhost= 'localhost' \n", "", "user=alice host=localhost"},
		{"+ for itself", "postgres://a+b:c+d@localhost/e+f?application_name=g+h", "", "user=a+b password=c+d host=localhost dbname=e+f application_name=g+h"},
		{"encoded", "postgres://alice%40corp:%2F%3f%23%25%3A%20%27%5C@localhost/a%2Fb", "", `user=alice@corp password='/?#%: \'\\' host=localhost dbname=a/b`},
		{"@ in a password", "postgres://alice:p@ss:w=rd&@localhost", "", `user=alice password=p@ss:w=rd& host=localhost`},
		{"backslashes", `user=al\ ice password='it\'s \\' host=localhost`, "", `user='al ice' password=it\'s\ \\ host=localhost`},
		{"the last one counts", "postgres://alice@localhost?sslmode=disable&sslmode=require", "", "user=alice host=localhost sslmode=require"},
		{"the query counts", "postgres://alice@a:1?host=b&port=2", "", "user=alice host=b port=2"},
		{"value with =", "postgres://alice@localhost?options=endpoint=x", "", "user=alice host=localhost options=endpoint=x"},
		{"empty host", "host='' user=alice", "PGHOST=db.example.com", "host=localhost user=alice"},
		{"PGSERVICE", "", "PGSERVICE=prod", "host=prod.example.com hostaddr=192.0.2.1 port=6543 user=bob password=s3cret sslmode=disable"},
		{"PGSERVICE, all given", "postgres://alice:s@db.example.com:5433/a?sslmode=require", "PGSERVICE=prod", "user=alice password=s host=db.example.com port=5433 dbname=a sslmode=require"},
		{"PGSERVICE, user given", "user=alice", "PGSERVICE=prod", "user=alice host=prod.example.com hostaddr=192.0.2.1 port=6543 password=s3cret sslmode=disable"},
		{"service, host given", "postgres://localhost?service=last", "PGSERVICE=prod", "user=last host=localhost"},
	} {
		t.Run(test.name, func(t *testing.T) {
			want, err := parseURL(test.same)
			if name, value, ok := strings.Cut(test.env, "="); ok {
				t.Setenv("PGSERVICEFILE", file)
				t.Setenv(name, value)
			}
			got, gotErr := parseURL(test.given)
			got.ServiceFile = ""
			if got, want := describe(got), describe(want); err != nil || gotErr != nil || got != want {
				t.Errorf("got  %s, %v\nwant %s, %v", got, gotErr, want, err)
			}
		})
	}
}

// describe returns what a configuration says, but for which settings were given.
func describe(cfg pq.Config) string {
	return regexp.MustCompile(` (set|multiHost|multiHostaddr|multiPort):\[[^]]*\]`).ReplaceAllString(fmt.Sprintf("%+v", cfg), "")
}

func TestParseURLErrors(t *testing.T) {
	clearEnvironment(t)
	const syntax = "neither a URL such as"
	for _, test := range []struct {
		name string
		url  string
		env  string // a variable of libpq's
		want string // in the error
	}{
		{"word", "s3cret", "", syntax},
		{"unterminated quote", "password='s3cret", "", syntax},
		{"unquoted space", "password=my s3cret", "", syntax},
		{"other URL", "mysql://alice:s3cret@localhost/a?sslmode=require", "", syntax},
		{"slash in a password", "postgres://alice:s3cret/x@localhost/a", "", syntax},
		{"digits and a slash", "postgres://alice:12/s3cret@localhost/a", "", syntax},
		{"digits and a question mark", "postgres://alice:12?s3cret=x@localhost", "", syntax},
		{"digits and #", "postgres://alice:12#s3cret@localhost/a", "", syntax},
		{"percent in a password", "postgres://alice:s3%cret@localhost/a", "", syntax},
		{"U+0000 in a password", "postgres://alice:s3cret%00@localhost/a", "", syntax},
		{"name for a port", "postgres://alice:s3cret@localhost:port/a", "", syntax},
		{"ports without commas", "postgres://alice:s3cret@a:1b:2/a", "", syntax},
		{"fragment", "postgres://alice:s3cret@localhost/a#b", "", syntax},
		{"fragment after a query", "postgres://alice:s3cret@localhost/a?sslmode=require#b", "", syntax},
		{"percent in a query", "postgres://alice:s3cret@localhost/a?sslmode=verify-full%", "", syntax},
		{"semicolon in a query", "postgres://alice:s3cret@localhost/a?a=b;sslmode=verify-full", "", syntax},
		{"query without a value", "postgres://alice:s3cret@localhost/a?sslmode", "", syntax},
		{"two lines", "postgres://alice:s3cret@localhost/a\nb", "", syntax},
		{"URL of SQLAlchemy", "postgresql+psycopg2://alice:s3cret@localhost/a?sslmode=require", "", "remove +psycopg2 from"},
		{"quotes", `"postgres://alice:s3cret@localhost/a"`, "", `remove " from`},
		{"command", "psql 'postgres://alice:s3cret@localhost/a'", "", "remove psql from"},
		{"export", "export DATABASE_URL=postgres://alice:s3cret@localhost/a", "", "remove export from"},
		{"variable", " DATABASE_URL='postgres://alice:s3cret@localhost/a'", "", "remove DATABASE_URL= from"},
		{"port", "postgres://alice:s3cret@localhost:65536/a", "", "port"},
		{"sslmode", "password=s3cret sslmode=no", "", "sslmode"},
		{"hostaddr", "password=s3cret hostaddr=localhost", "", "hostaddr"},
		{"sslrootcert=system and a weaker sslmode", "password=s3cret sslrootcert=system sslmode=require", "", "sslmode"},
		{"PGSSLMODE", "password=s3cret", "PGSSLMODE=no", "PGSSLMODE"},
		{"PGCHANNELBINDING", "password=s3cret", "PGCHANNELBINDING=require", "PGCHANNELBINDING"},
		{"PGSERVICE", "password=s3cret", "PGSERVICE=prod", `service "prod" not found`},
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

// A password with a special character anywhere is taken whole or refused, without
// showing it. None of it becomes a host, a port or a setting.
func FuzzParseURLPassword(f *testing.F) {
	for c := ' '; c <= '~'; c++ {
		f.Add("43210", string(c), "cretpart")
		f.Add("s3cretpart", string(c)+string(c), "87654")
	}
	f.Fuzz(func(t *testing.T, before, special, after string) {
		for _, part := range []string{before, after} {
			if !regexp.MustCompile(`^([0-9]{5}|[a-z0-9]{8,})$`).MatchString(part) {
				return
			}
		}
		for _, format := range []string{"postgres://alice:%s@localhost/a", "postgres://alice:%s@a,b:2?sslmode=require", "user=alice password=%s host=localhost"} {
			cfg, err := parseURL(fmt.Sprintf(format, before+special+after))
			cfg.Password = ""
			if shown := fmt.Sprintf("%+v %v", cfg, err); strings.Contains(shown, before) || strings.Contains(shown, after) {
				t.Errorf("a password with %q is shown: %s", special, shown)
			}
		}
	})
}

func TestTransient(t *testing.T) {
	t.Parallel()
	state := func(code, message string) error {
		return fmt.Errorf("while testing: %w", &pq.Error{Code: pqerror.Code(code), Message: message})
	}
	connect := func(err error) error { return fmt.Errorf("while testing: %w", &connectError{err}) }
	hosts := func(errs ...error) error {
		return connect(fmt.Errorf("pq: could not connect to any of the hosts:\nconnecting to db-standby.read-only:5432: %w", errors.Join(errs...)))
	}
	refused := &net.OpError{Op: "dial", Net: "tcp", Err: os.NewSyscallError("connect", syscall.ECONNREFUSED)}
	passing := []error{
		io.EOF, driver.ErrBadConn, errUnknownOutcome, context.DeadlineExceeded, syscall.ECONNRESET, otherError("57P01"),
		fmt.Errorf("failed to receive message: %w", io.ErrUnexpectedEOF), // as pgx has it
		fmt.Errorf("write failed: %w", &net.OpError{Op: "write", Err: os.NewSyscallError("write", syscall.EPIPE)}),
		connect(refused), connect(io.EOF), connect(&net.OpError{Op: "dial", Err: &net.DNSError{Err: "no such host", IsNotFound: true}}),
		hosts(refused, refused), hosts(refused, state("57P03", "the database system is starting up")),
		connect(errors.New("server is in hot standby mode")), connect(errors.New("session is read-only")),
		connect(errors.New("pq: server error: could not fork new process for connection: Resource temporarily unavailable")),
		connect(state("XX000", "Couldn't connect to compute node")),              // as proxies have it
		connect(state("08P01", "no more connections allowed (max_client_conn)")), // as PgBouncer has it
		connect(state("08P01", "server login has been failing, try again later (server_login_retry)")),
	}
	for _, code := range strings.Fields("08006 08P01 25006 40001 40P01 53100 53300 55P03 57014 57P01 57P03 58030") {
		passing = append(passing, state(code, ""), connect(state(code, "")))
	}
	lasting := []error{
		nil, errors.New("defect"), otherError("42P01"), state("XX000", ""), hosts(pq.ErrSSLNotSupported),
		connect(&net.OpError{Op: "remote error", Err: tls.AlertError(70)}),
		connect(&tls.CertificateVerificationError{Err: x509.UnknownAuthorityError{}}),
		connect(x509.UnknownAuthorityError{}), connect(x509.CertificateInvalidError{Reason: x509.Expired}), // with verify-ca
		connect(&fs.PathError{Op: "open", Path: "ca.crt", Err: syscall.ENOENT}),
		connect(errors.New("pq: couldn't parse pem from sslrootcert")), connect(pq.ErrSSLKeyHasWorldPermissions),
		connect(errors.New("pq: unsupported authentication method: KerberosV5 (2)")),
	}
	for _, code := range strings.Fields("22023 23505 28000 28P01 3D000 42501 42704 42P01 55006 XX001") {
		lasting = append(lasting, state(code, ""), connect(state(code, "")))
	}
	for _, text := range []string{"unsupported startup parameter: search_path", "password authentication failed", "SASL authentication failed",
		"no such user: alice", "no such database: a", "SSL required", "login rejected"} {
		lasting = append(lasting, connect(state("08P01", text))) // as PgBouncer has it
	}
	for want, errs := range map[bool][]error{true: passing, false: lasting} {
		for _, err := range errs {
			if transient(err) != want {
				t.Errorf("%v: %t, want %t", err, !want, want)
			}
		}
	}
}

// otherError is an error of another driver that has this SQLSTATE.
type otherError string

func (e otherError) Error() string    { return "an error of another driver" }
func (e otherError) SQLState() string { return string(e) }

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

// A tcpSwitch forwards TCP connections to a server that can be exchanged for new
// ones, as the address of a service does.
type tcpSwitch struct {
	addr   *net.TCPAddr
	target atomic.Pointer[string]
}

func newSwitch(t *testing.T, target string) *tcpSwitch {
	listener := listen(t, "127.0.0.1:0")
	t.Cleanup(func() { listener.Close() })
	s := &tcpSwitch{addr: listener.Addr().(*net.TCPAddr)}
	s.target.Store(&target)
	go func() {
		for {
			client, err := listener.Accept()
			if err != nil {
				return
			}
			server, err := net.Dial("tcp", *s.target.Load())
			if err != nil {
				client.Close()
				continue
			}
			go func() { io.Copy(client, server); client.Close() }()
			go func() { io.Copy(server, client); server.Close() }()
		}
	}()
	return s
}

// newTCPServer returns a PostgreSQL of the test's own on a port of 127.0.0.1 and ::1.
func newTCPServer(t *testing.T) (server *localDB, port int) {
	listener := listen(t, "127.0.0.1:0")
	port = listener.Addr().(*net.TCPAddr).Port
	listener.Close()
	return newServer(t, "listen_addresses=127.0.0.1,::1", fmt.Sprintf("port=%d", port)), port
}

// newPooler returns the settings for a PgBouncer of the test's own in transaction
// mode, by TCP and by its Unix socket. It lends one connection to server.
func newPooler(t *testing.T, server, auth string) (tcp, socket string) {
	t.Helper()
	program, err := exec.LookPath("pgbouncer")
	if err != nil {
		program = "/usr/sbin/pgbouncer" // Debian's, not in everybody's PATH
	}
	dir := shortTempDir(t)
	listener := listen(t, "127.0.0.1:0")
	port := listener.Addr().(*net.TCPAddr).Port
	listener.Close()
	file, users := filepath.Join(dir, "pgbouncer.ini"), filepath.Join(dir, "users")
	if err := errors.Join(os.WriteFile(users, []byte(`"alice" "s3cret"`), 0o644), os.WriteFile(file, fmt.Appendf(nil, `[databases]
app = dbname=postgres user=postgres %s
[pgbouncer]
pool_mode = transaction
default_pool_size = 1
auth_type = %s
auth_file = %s
listen_addr = 127.0.0.1
listen_port = %d
unix_socket_dir = %s
`, server, auth, users, port, dir), 0o644)); err != nil {
		t.Fatal(err)
	}
	pooler := exec.Command(program, "-q", file)
	if os.Geteuid() == 0 {
		pooler.Args = append(pooler.Args, "-u", localAccount)
	}
	if err := pooler.Start(); err != nil {
		t.Fatal(err, " (apt-get install pgbouncer, or brew install pgbouncer)")
	}
	t.Cleanup(func() { pooler.Process.Kill(); pooler.Wait() })
	const login = " user=alice password=s3cret dbname=app sslmode=disable"
	tcp, socket = fmt.Sprintf("host=127.0.0.1 port=%d", port)+login, fmt.Sprintf("host=%s port=%d", dir, port)+login
	db := open(t, socket)
	defer db.Close()
	waitFor(t, "PgBouncer to be ready", func() bool { return db.Ping() == nil })
	return tcp, socket
}

// Only on a direct connection statements are prepared and the session changed.
func TestPrepareAuto(t *testing.T) {
	t.Parallel()
	server, port := newTCPServer(t)
	cfg, err := parseURL(server.URL)
	if err != nil {
		t.Fatal(err)
	}
	gone := listen(t, "127.0.0.1:0")
	gone.Close()
	onTCP := fmt.Sprintf("host=127.0.0.1 port=%d", port)
	overTCP, overTCPBySocket := newPooler(t, onTCP, "any")
	overSocket, overSocketBySocket := newPooler(t, fmt.Sprintf("host=%s port=%d", cfg.Host, port), "any")
	const postgres = " user=postgres dbname=postgres sslmode=disable"
	type test struct {
		name     string
		url      string
		mode     prepareMode
		prepared bool
	}
	tests := []test{
		{"127.0.0.1", onTCP + postgres, prepareAuto, true},
		{"localhost", fmt.Sprintf("host=localhost port=%d", port) + postgres, prepareAuto, true},
		{"mapped IPv4", fmt.Sprintf("host=::ffff:127.0.0.1 port=%d", port) + postgres, prepareAuto, true},
		{"second host", fmt.Sprintf("host=127.0.0.1,localhost port=%d,%d", gone.Addr().(*net.TCPAddr).Port, port) + postgres, prepareAuto, true},
		{"never", onTCP + postgres, prepareNever, false},
		{"socket", server.URL, prepareAuto, false},
		{"socket, always", server.URL, prepareAlways, true},
		{"TCP proxy", fmt.Sprintf("host=127.0.0.1 port=%d", newSwitch(t, fmt.Sprintf("127.0.0.1:%d", port)).addr.Port) + postgres, prepareAuto, false},
		{"PgBouncer on TCP to TCP", overTCP, prepareAuto, false},
		{"PgBouncer on a socket to TCP", overTCPBySocket, prepareAuto, false},
		{"PgBouncer on TCP to a socket", overSocket, prepareAuto, false},
		{"PgBouncer on a socket to a socket", overSocketBySocket, prepareAuto, false},
		{"second host is PgBouncer", strings.Replace(overTCP, "host=127.0.0.1 port=", fmt.Sprintf("host=127.0.0.1,127.0.0.1 port=%d,", gone.Addr().(*net.TCPAddr).Port), 1), prepareAuto, false},
	}
	if listener, err := net.Listen("tcp", "[::1]:0"); err == nil { // where there is IPv6
		listener.Close()
		tests = append(tests, test{"::1", fmt.Sprintf("host=::1 port=%d", port) + postgres, prepareAuto, true})
	}
	for _, test := range tests {
		db, err := openDB(test.url, test.mode)
		if err != nil {
			t.Fatal(err)
		}
		defer db.Close()
		db.SetMaxOpenConns(1)
		for range 2 { // the second time without a look
			var statements int
			var sort, plans string
			err = db.QueryRow(`SELECT count(*), current_setting('enable_sort'), current_setting('plan_cache_mode')
				FROM pg_prepared_statements WHERE $1 <> ''`, "x").Scan(&statements, &sort, &plans)
			got, want := fmt.Sprintf("%d %s %s", statements, sort, plans), "0 on auto"
			if test.prepared {
				want = "1 off force_generic_plan"
			}
			if err != nil || got != want {
				t.Errorf("%s: %s, %v, want %s", test.name, got, err, want)
			}
		}
	}
}

// A statement that a prepared one has become unfit for runs all the same, once.
func TestPreparedAgain(t *testing.T) {
	t.Parallel()
	dbURL := newDatabase(t)
	db, err := openDB(dbURL, prepareAlways)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	db.SetMaxOpenConns(1)
	insert := func(want string) {
		t.Helper()
		var got string
		if err := db.QueryRow("INSERT INTO a VALUES (DEFAULT, $1) RETURNING *", "x").Scan(new(int), &got); err != nil || got != want {
			t.Errorf("%q, %v, want %q", got, err, want)
		}
	}
	execSQL(t, dbURL, "CREATE TABLE a (n serial, s char(1))")
	insert("x")
	execSQL(t, dbURL, "ALTER TABLE a ALTER s TYPE char(3)")
	insert("x  ") // 0A000
	insert("x  ")
	if _, err := db.Exec("DEALLOCATE ALL"); err != nil {
		t.Fatal(err)
	}
	insert("x  ") // 26000
	if n := queryInt(t, dbURL, "SELECT count(*) FROM a"); n != 4 {
		t.Errorf("%d rows of 4 statements", n)
	}
	for n := range 2 * maxPrepared { // the server does not have to keep them all
		if err := db.QueryRow(fmt.Sprint("SELECT $1::int + ", n), 1).Scan(new(int)); err != nil {
			t.Fatal(err)
		}
	}
	var n int
	if err := db.QueryRow("SELECT count(*) FROM pg_prepared_statements").Scan(&n); err != nil || n != maxPrepared {
		t.Errorf("%d prepared statements, %v", n, err)
	}
}

// No statement of the host's own runs twice when its reply is lost, whatever way
// it goes.
func TestLostReply(t *testing.T) {
	t.Parallel()
	dbURL := newDatabase(t)
	execSQL(t, dbURL, "CREATE TABLE a (n int); CREATE FUNCTION f() RETURNS int LANGUAGE sql AS 'INSERT INTO a DEFAULT VALUES RETURNING 1'")
	p := newProxy(t, dbURL)
	executed := 0
	lose := func(way, statement string, mode prepareMode, f fault) error {
		p.do(func(bool) fault { return pass })
		db, err := openDB(p.url, mode)
		if err != nil {
			t.Fatal(err)
		}
		defer db.Close()
		args := make([]any, strings.Count(statement, "$"))
		tx, err := db.Begin()
		if err == nil && way == "Commit" {
			_, err = tx.Exec(statement, args...)
		} else if err == nil {
			err = tx.Rollback() // which leaves an idle connection
		}
		if err != nil {
			t.Fatal(err)
		}
		p.times(1, f)
		switch way {
		case "Exec":
			_, err = db.Exec(statement, args...)
		case "Query":
			err = db.QueryRow(statement, args...).Scan(new(int))
		case "Commit":
			err = tx.Commit()
		}
		return err
	}
	for _, way := range []string{"Exec", "Query", "Commit"} {
		for _, statement := range []string{"INSERT INTO a DEFAULT VALUES RETURNING 1", "INSERT INTO a VALUES ($1) RETURNING 1", "SELECT f()"} {
			for _, mode := range []prepareMode{prepareNever, prepareAlways} {
				for f := cutBefore; f < stall; f++ {
					what := fmt.Sprintf("%s %s, mode %d, %v", way, statement, mode, f)
					if err := lose(way, statement, mode, f); err == nil && f != cutWithin || err != nil && !transient(err) {
						t.Errorf("%s: %v", what, err)
					}
					if f.executed() {
						executed++
					}
					p.conns.Wait()
					if n := queryInt(t, dbURL, "SELECT count(*) FROM a"); n != executed {
						t.Fatalf("%s: there are %d rows, not %d", what, n, executed)
					}
				}
			}
		}
	}
	db := open(t, newDatabase(t))
	defer db.Close()
	if _, err := db.Prepare("SELECT 1"); err == nil || !strings.Contains(err.Error(), "not supported") {
		t.Errorf("Prepare: %v", err)
	}
}

// The end of its context, which need not have a deadline, ends any call on a
// server that has fallen silent, and the pool goes on with another connection.
// connect_timeout ends connecting, also when only the last look is not answered.
func TestSilentServer(t *testing.T) {
	t.Parallel()
	dbURL := newDatabase(t)
	for n, name := range []string{"Exec", "Query", "Ping", "Begin", "Commit", "Connect", "connect_timeout"} {
		for _, f := range []fault{stall, stallEnd} {
			for _, mode := range []prepareMode{prepareAuto, prepareAlways} {
				t.Run(fmt.Sprintf("%s,%v,%d", name, f, mode), func(t *testing.T) {
					t.Parallel()
					p := newProxy(t, dbURL)
					db, err := openDB(p.url+strings.Repeat(" connect_timeout=1", n/6), mode)
					if err != nil {
						t.Fatal(err)
					}
					defer db.Close()
					db.SetMaxOpenConns(1)
					ctx, cancel := context.WithCancel(t.Context())
					defer cancel()
					if n < 5 {
						if err := db.Ping(); err != nil {
							t.Fatal(err)
						}
					}
					tx := new(sql.Tx)
					if name == "Commit" {
						if tx, err = db.BeginTx(ctx, nil); err != nil {
							t.Fatal(err)
						}
					}
					p.do(func(executes bool) fault {
						if executes == (n < 5) {
							return f
						}
						return pass
					})
					ended := make(chan error, 1)
					go func() {
						var err error
						switch name {
						case "Exec":
							_, err = db.ExecContext(ctx, "SELECT 1")
						case "Query":
							err = db.QueryRowContext(ctx, "SELECT $1::int", 1).Scan(new(int))
						case "Begin":
							_, err = db.BeginTx(ctx, nil)
						case "Commit":
							err = tx.Commit()
						default:
							err = db.PingContext(ctx)
						}
						ended <- err
					}()
					waitFor(t, "the server to be silent", func() bool { return p.counts[f].Load() > 0 })
					if name != "connect_timeout" {
						cancel()
					}
					waitFor(t, "the call to end", func() bool { return len(ended) == 1 && db.Stats().InUse == 0 })
					if err := <-ended; err == nil && f == stall {
						t.Error("no error")
					}
					p.do(func(bool) fault { return pass })
					if err := db.PingContext(t.Context()); err != nil {
						t.Errorf("afterwards: %v", err)
					}
				})
			}
		}
	}
}

// Clients that leave all at once free their connections, though PostgreSQL ignores
// requests to cancel that arrive before their statements.
func TestLeaveTogether(t *testing.T) {
	t.Parallel()
	db := open(t, newDatabase(t))
	defer db.Close()
	for round := range 20 {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		together := make(chan struct{})
		for range 50 {
			go func() {
				<-together
				db.QueryRowContext(ctx, "SELECT pg_sleep($1)", patience.Seconds()*2).Scan(new(string))
			}()
		}
		close(together)
		waitFor(t, "statements to be sent", func() bool { return db.Stats().InUse == 10 || round%2 == 0 && db.Stats().InUse > 0 })
		cancel()
		waitFor(t, "all to leave", func() bool { return db.Stats().InUse == 0 })
	}
}

// An address that moves to another server is followed by all connections as soon
// as one of them finds its server read-only. A database that is read-only for a
// while costs nothing after it.
func TestReadOnly(t *testing.T) {
	t.Parallel()
	first, firstPort := newTCPServer(t)
	second, secondPort := newTCPServer(t)
	address := newSwitch(t, fmt.Sprintf("127.0.0.1:%d", firstPort))
	for _, server := range []*localDB{first, second} {
		execSQL(t, server.URL, "CREATE TABLE a (n int)")
	}
	db := open(t, fmt.Sprintf("host=127.0.0.1 port=%d user=postgres dbname=postgres sslmode=disable", address.addr.Port))
	defer db.Close()
	write := func() error { _, err := db.Exec("INSERT INTO a VALUES ($1)", 1); return err }
	(&api{TB: t, db: db}).fillPool()
	execSQL(t, first.URL, "ALTER SYSTEM SET default_transaction_read_only = on")
	execSQL(t, first.URL, "SELECT pg_reload_conf()")
	second0 := fmt.Sprintf("127.0.0.1:%d", secondPort)
	address.target.Store(&second0)
	waitFor(t, "the first server to be read-only", func() bool { return sqlState(write()) == "25006" })
	var conns sync.WaitGroup
	for range 10 {
		conns.Go(func() {
			conn, err := db.Conn(t.Context())
			if err == nil {
				_, err = conn.ExecContext(t.Context(), "INSERT INTO a SELECT 1 FROM pg_sleep(1)") // meanwhile the others take other connections
				conn.Close()
			}
			if err != nil {
				t.Errorf("after the address has moved: %v", err)
			}
		})
	}
	conns.Wait()
	for range 2 {
		execSQL(t, second.URL, "ALTER DATABASE postgres SET default_transaction_read_only = on")
		execSQL(t, second.URL, "SELECT pg_terminate_backend(pid, 30000) FROM pg_stat_activity WHERE datname = 'postgres' AND pid <> pg_backend_pid()")
		for range 3 {
			if err := write(); sqlState(err) != "25006" || !transient(err) {
				t.Errorf("a read-only database: %v", err)
			}
		}
		execSQL(t, second.URL, "BEGIN READ WRITE; ALTER DATABASE postgres RESET default_transaction_read_only; COMMIT")
		if err := write(); err != nil {
			t.Errorf("after the database was read-only: %v", err)
		}
	}
}

// A session is not used again after errors that later statements would meet too.
func TestCondemnedSession(t *testing.T) {
	t.Parallel()
	db := open(t, newDatabase(t))
	defer db.Close()
	db.SetMaxOpenConns(1)
	for state, want := range map[string]bool{"25006": true, "57P01": true, "57P03": true, "08006": true, "08P01": true, "57014": false, "40001": false, "23505": false} {
		var before, after int
		for _, pid := range []*int{&before, &after} {
			if err := db.QueryRow("SELECT pg_backend_pid()").Scan(pid); err != nil {
				t.Fatal(err)
			}
			_, err := db.Exec("DO $$ BEGIN RAISE EXCEPTION 'x' USING ERRCODE = '" + state + "'; END $$")
			if sqlState(err) != state {
				t.Fatal(err)
			}
		}
		if got := before != after; got != want {
			t.Errorf("%s: another connection %t, want %t", state, got, want)
		}
	}
}

// A start waits for a server that a proxy does not have yet, which some report as
// an internal error.
func TestProxyWithoutServer(t *testing.T) {
	t.Parallel()
	listener := listen(t, "127.0.0.1:0")
	dbURL := newDatabase(t)
	refused := make(chan struct{})
	go func() {
		defer close(refused)
		for range 2 {
			client, err := listener.Accept()
			if err != nil {
				return
			}
			message(bufio.NewReader(client), 0)
			text := "SFATAL\x00CXX000\x00MCouldn't connect to compute node\x00\x00"
			client.Write(append(binary.BigEndian.AppendUint32([]byte("E"), uint32(4+len(text))), text...))
			client.Close()
		}
	}()
	for range 2 {
		if _, err := applySchema(t, onTCP(dbURL, listener.Addr())); !errors.Is(err, ErrUnavailable) {
			t.Error(err)
		}
	}
	<-refused
	relay(t, listener, dbURL, io.Discard)
	if _, err := applySchema(t, onTCP(dbURL, listener.Addr())); err != nil {
		t.Error(err)
	}
}

// What PgBouncer refuses stops a start at once, with a message that names it.
func TestPoolerRefuses(t *testing.T) {
	t.Parallel()
	cfg, err := parseURL(newDatabase(t))
	if err != nil {
		t.Fatal(err)
	}
	_, socket := newPooler(t, fmt.Sprintf("host=%s port=%d", cfg.Host, cfg.Port), "scram-sha-256")
	for old, new := range map[string]string{"s3cret": "s3cret2", "dbname=app": "dbname=unknown", "user=alice": "user=bob", "sslmode=disable": "search_path=public"} {
		_, err := applySchema(t, strings.Replace(socket, old, new, 1))
		name := regexp.MustCompile("authentication failed|unknown|bob|search_path")
		if err == nil || errors.Is(err, ErrUnavailable) || !name.MatchString(err.Error()) || strings.Contains(err.Error(), "s3cret") {
			t.Errorf("%s: %v", new, err)
		}
	}
}

// A process whose user has no name, as in an image, is told that no user is given.
func TestNoUser(t *testing.T) {
	if os.Getenv("TASKS_TEST_NO_USER") != "" {
		_, err := OpenDB("host=localhost")
		fmt.Println(err)
		return
	}
	if os.Geteuid() != 0 {
		return // nobody else can become a user without a name
	}
	dir := shortTempDir(t)
	program := filepath.Join(dir, "test")
	binary, err := os.ReadFile(os.Args[0])
	if err := errors.Join(err, os.WriteFile(program, binary, 0o755)); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(program, "-test.run=^TestNoUser$")
	cmd.Dir, cmd.Env = dir, []string{"TASKS_TEST_NO_USER=1"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65532, Gid: 65532}}
	if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "no user given") {
		t.Errorf("%s, %v", out, err)
	}
}

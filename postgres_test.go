package main

// postgres_test.go is how connection strings are understood, as tables, and what
// comes of them on a PostgreSQL that wants TLS and passwords.

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"database/sql"
	"database/sql/driver"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/lib/pq"
	"github.com/lib/pq/pqerror"
)

// environment takes away what libpq would read, but for the variables in front of a
// connection string, as in a shell. It returns the string.
func environment(t *testing.T, s string) string {
	for _, variable := range os.Environ() {
		if name, _, _ := strings.Cut(variable, "="); strings.HasPrefix(name, "PG") {
			t.Setenv(name, "") // puts it back afterwards
			os.Unsetenv(name)
		}
	}
	for strings.HasPrefix(s, "PG") {
		variable, rest, _ := strings.Cut(s, " ")
		name, value, _ := strings.Cut(variable, "=")
		t.Setenv(name, value)
		s = rest
	}
	return s
}

func TestParseURL(t *testing.T) {
	const neon = "ep-cool-darkness-a1b2c3d4-pooler.us-east-2.aws.neon.tech"
	for want, given := range map[string][]string{ // hosts, sslmode, sslrootcert and settings of the server
		neon + ":5432 verify-full system": {
			"postgresql://alex:AbC123dEf@" + neon + "/dbname?sslmode=require&channel_binding=require",
			"postgresql://alex:AbC123dEf@" + neon + "/dbname?channel_binding=require&keepalives=1&keepalives_idle=30&gssencmode=disable&", "host=" + neon + " user=alex password=AbC123dEf dbname=dbname sslmode=require channel_binding=require",
		},
		"localhost:5432 disable":                                 {"", "dbname=a", "postgres:///a", "PGHOST=db.example.com host=localhost", "host=localhost channel_binding=prefer", "host=localhost binary_parameters=no"},
		"localhost:5432 prefer":                                  {"host=localhost sslmode=prefer"},
		"localhost:5432 require":                                 {"PGSSLMODE=verify-ca host=localhost sslmode=require"},
		"localhost:5432 verify-ca":                               {"PGSSLMODE=verify-ca host=localhost"},
		"localhost:5432 verify-full system":                      {"host=localhost sslrootcert=system", "host=localhost channel_binding=require", "host=localhost channel_binding=require sslmode=verify-ca"},
		"localhost:5432 verify-full ca.crt":                      {"host=localhost channel_binding=require sslrootcert=ca.crt", "PGSSLROOTCERT=ca.crt host=localhost channel_binding=require"},
		"localhost:5432 disable map[my.setting:c search_path:b]": {"postgres://localhost/a?search_path=b&my.setting=c", "postgres://localhost/a?Search_Path=b&MY.setting=c", "Search_Path=b My.Setting=c dbname=a"},
		"/run/postgresql:5432 disable":                           {"host=/run/postgresql", "host=/run/postgresql sslmode=require"},
		"@a:5432 disable":                                        {"host=@a"},
		"127.0.0.2:5432 disable":                                 {"host=127.0.0.2"},
		"LocalHost:5432 disable":                                 {"host=LocalHost"},
		"127.0.0.3:5432 disable map[gssencmode:require]":         {"host=127.0.0.3 gssencmode=require"}, // the server refuses it
		"::1:5432 disable":                                       {"host=::1", "postgres://[::1]/a"},
		"::ffff:127.0.0.1:5432 disable":                          {"host=::ffff:127.0.0.1"},
		"0.0.0.0:5432 require":                                   {"host=0.0.0.0"},
		"localhost/192.0.2.1:5432 require":                       {"host=localhost hostaddr=192.0.2.1", "hostaddr=192.0.2.1"},
		"localhost.example.com:5432 require":                     {"host=localhost.example.com"},
		"db.example.com/127.0.0.1:5432 disable":                  {"host=db.example.com hostaddr=127.0.0.1"},
		"db.example.com:5432 disable":                            {"postgres://db.example.com/a?sslmode=disable"},
		"db.example.com:5432 require":                            {"PGHOST=db.example.com dbname=a", "postgres://db.example.com/a?channel_binding=disable"},
		"db.example.com:5433 require":                            {"PGPORT=5433 postgres://db.example.com/a"},
		"localhost:1 127.0.0.1:2 disable":                        {"host=localhost,127.0.0.1 port=1,2"},
		"localhost:1 localhost:1 disable":                        {"host=localhost, port=1"},
		"localhost:5432 db.example.com:5432 require":             {"host=localhost,db.example.com"},
		"a.example:1 b.example:2 require":                        {"postgres://a.example:1,b.example:2/a", "postgres://a.example,b.example/a?port=1,2"},
	} {
		for _, s := range given {
			t.Run(s, func(t *testing.T) {
				cfg, err := parseURL(environment(t, s))
				got := ""
				for _, h := range append([]pq.ConfigMultihost{{Host: cfg.Host, Hostaddr: cfg.Hostaddr, Port: cfg.Port}}, cfg.Multi...) {
					if h.Hostaddr.IsValid() {
						h.Host += "/" + h.Hostaddr.String()
					}
					got += fmt.Sprintf("%s:%d ", h.Host, h.Port)
				}
				got += fmt.Sprintf("%s %s %v", cfg.SSLMode, cfg.SSLRootCert, cfg.Runtime)
				got = strings.Join(strings.Fields(strings.TrimSuffix(got, "map[]")), " ")
				if err != nil || got != want || !cfg.BinaryParameters {
					t.Errorf("got %s, binary_parameters %t, %v\nwant %s", got, cfg.BinaryParameters, err, want)
				}
			})
		}
	}
}

// Strings that mean the same, as libpq reads them.
func TestParseURLAsLibpq(t *testing.T) {
	file := filepath.Join(t.TempDir(), "services")
	if err := os.WriteFile(file, []byte("\n# user=comment\n[other]\nuser=other\n[ prod ]\nhost=prod.example.com\nhostaddr = 192.0.2.1\n"+
		"port=6543\nuser=bob\npassword = s3cret\nsslmode=disable\n[last]\nuser=last\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	services := "PGSERVICEFILE=" + file + " PGSERVICE=prod "
	for given, same := range map[string]string{
		"postgres://alice@%2Frun%2Fpg:5433/a":                              "user=alice host=/run/pg port=5433 dbname=a",
		"postgres://alice@/a?host=/run/pg":                                 "user=alice host=/run/pg dbname=a",
		"postgres://alice@a:1,b:2/c":                                       "user=alice host=a,b port=1,2 dbname=c",
		"postgres://alice@a,[::1]:2,/c":                                    "user=alice host=a,::1, port=5432,2, dbname=c",
		"postgres://alice@[fe80::1%25eth0]:1":                              "user=alice host=fe80::1%eth0 port=1",
		"\n postgresql://alice@localhost/a\r\n":                            "user=alice host=localhost dbname=a",
		"\tuser = alice\nhost= 'localhost' \n":                             "user=alice host=localhost",
		"postgres://alice@a:1?host=b&port=2":                               "user=alice host=b port=2", // the query counts, and the last of a name
		"postgres://alice@a?port=1&port=2":                                 "user=alice host=a port=2",
		"postgres://alice:p@ss:w=rd&@localhost":                            "user=alice password=p@ss:w=rd& host=localhost",
		`user=al\ ice password='it\'s \\' host=a`:                          `user='al ice' password=it\'s\ \\ host=a`,
		"PGHOST=db.example.com host='' user=a":                             "host=localhost user=a",
		"postgres://a+b:c+d@localhost/e+f?application_name=g+h":            "user=a+b password=c+d host=localhost dbname=e+f application_name=g+h",
		"postgres://alice%40corp:%2F%3f%23%25%3A%20%27%5C@localhost/a%2Fb": `user=alice@corp password='/?#%: \'\\' host=localhost dbname=a/b`,
		"postgres://alice@localhost?ssl=true":                              "user=alice host=localhost sslmode=require",
		"postgres://alice@localhost?options=endpoint=x":                    "user=alice host=localhost options=endpoint=x",
		services:                "host=prod.example.com hostaddr=192.0.2.1 port=6543 user=bob password=s3cret sslmode=disable",
		services + "user=alice": "user=alice host=localhost",
		services + "postgres://alice:s@db.example.com:5433/a?sslmode=require": "user=alice password=s host=db.example.com port=5433 dbname=a sslmode=require",
		services + "service=last": "user=last host=localhost",
	} {
		t.Run(given, func(t *testing.T) {
			want, err := parseURL(environment(t, same))
			got, gotErr := parseURL(environment(t, given))
			got.Service, got.ServiceFile = "", ""
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
	for want, given := range map[string][]string{
		"neither a URL such as": {
			"s3cret", "password='s3cret", "password=my s3cret", "mysql://alice:s3cret@localhost/a?sslmode=require",
			"postgres://alice:s3cret/x@localhost/a", "postgres://alice:12/s3cret@localhost/a", "postgres://alice:12?s3cret=x@localhost",
			"postgres://alice:12#s3cret@localhost/a", "postgres://alice:s3%cret@localhost/a", "postgres://alice:s3cret%00@localhost/a",
			"postgres://alice:s3cret@localhost:port/a", "postgres://alice:s3cret@a:1b:2/a", "postgres://alice:s3cret@localhost/a\nb",
			"postgres://alice:s3cret@localhost/a#b", "postgres://alice:s3cret@localhost/a?sslmode=require#b", "postgres://alice:s3cret@localhost/a?sslmode",
			"postgres://alice:s3cret@localhost/a?sslmode=verify-full%", "postgres://alice:s3cret@localhost/a?a=b;sslmode=verify-full",
		},
		"remove +psycopg2 from":     {"postgresql+psycopg2://alice:s3cret@localhost/a?sslmode=require"}, // as SQLAlchemy has it
		`remove " from`:             {`"postgres://alice:s3cret@localhost/a"`},
		"remove ' from":             {"'postgres://alice:s3cret@localhost/a'"},
		"remove ` from":             {"`postgres://alice:s3cret@localhost/a`"},
		"remove DB_URI= from":       {"DB_URI=postgres://alice:s3cret@localhost/a"},
		"remove psql from":          {"psql 'postgres://alice:s3cret@localhost/a'"},
		"remove export from":        {"export DATABASE_URL=postgres://alice:s3cret@localhost/a"},
		"remove DATABASE_URL= from": {" DATABASE_URL='postgres://alice:s3cret@localhost/a'"},
		"port":                      {"postgres://alice:s3cret@localhost:65536/a"},
		"sslmode":                   {"password=s3cret sslmode=no", "password=s3cret sslrootcert=system sslmode=require"},
		"hostaddr":                  {"password=s3cret hostaddr=localhost"},
		"PGSSLMODE":                 {"PGSSLMODE=no password=s3cret"},
		"PGCHANNELBINDING":          {"PGCHANNELBINDING=require password=s3cret"},
		`service "prod" not found`:  {"PGSERVICEFILE=/dev/null service=prod"},
		"service must be the only":  {"service=prod password=s3cret", "postgres://alice:s3cret@localhost/a?service=prod"},
		"socket":                    {"host=/run/postgresql,db.example.com password=s3cret sslmode=verify-full", "host=@a,db.example.com password=s3cret"},
		"channel_binding": {"password=s3cret channel_binding=yes", "host=db.example.com password=s3cret channel_binding=require sslmode=disable",
			"host=/run/postgresql password=s3cret channel_binding=require"},
	} {
		for _, s := range given {
			t.Run(s, func(t *testing.T) {
				_, err := OpenDB(environment(t, s))
				if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "s3cret") {
					t.Errorf("%v, want %q", err, want)
				}
			})
		}
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
	state := func(code, message string) error { return &pq.Error{Code: pqerror.Code(code), Message: message} }
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
		connect(&net.OpError{Op: "remote error", Err: tls.AlertError(70)}), connect(&tls.CertificateVerificationError{Err: x509.UnknownAuthorityError{}}),
		connect(x509.UnknownAuthorityError{}), connect(x509.CertificateInvalidError{Reason: x509.Expired}), // with verify-ca
		connect(&fs.PathError{Op: "open", Path: "ca.crt", Err: syscall.ENOENT}), connect(pq.ErrSSLKeyHasWorldPermissions),
		connect(errors.New("pq: couldn't parse pem from sslrootcert")), connect(errors.New("pq: unsupported authentication method: KerberosV5 (2)")),
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

// A statement and its parameters are one batch, so that no pooler comes between.
func TestOneBatch(t *testing.T) {
	t.Parallel()
	p := newProxy(t, newDatabase(t))
	db := open(t, p.url)
	defer db.Close()
	if err := db.Ping(); err != nil {
		t.Fatal(err)
	}
	before := p.counts[pass].Load()
	var got string
	err := db.QueryRow("SELECT $1::text", "parameter").Scan(&got)
	if batches := p.counts[pass].Load() - before; got != "parameter" || batches != 1 {
		t.Errorf("%q, %v, in %d batches", got, err, batches)
	}
}

// onTCP returns dbURL with the address of a listener in place of the socket.
func onTCP(dbURL string, addr net.Addr) string {
	host, port, _ := net.SplitHostPort(addr.String())
	dbURL = regexp.MustCompile("host=[^ ]*").ReplaceAllString(dbURL, "host="+host)
	return regexp.MustCompile("port=[^ ]*").ReplaceAllString(dbURL, "port="+port)
}

// wantRefusal fails the test unless a start fails without a second try and without
// naming a password.
func wantRefusal(t *testing.T, dbURL, want string) {
	t.Helper()
	_, err := applySchema(t, dbURL)
	if err == nil || errors.Is(err, ErrUnavailable) || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "s3cret") {
		t.Errorf("%v, want %q", err, want)
	}
}

// The service connects with TLS, where that is due, to a PostgreSQL that asks for
// passwords and has a self-signed certificate for 127.0.0.1.
func TestSecureServer(t *testing.T) {
	t.Parallel()
	dir, site := shortTempDir(t), httptest.NewTLSServer(nil)
	site.Close()
	key, err := x509.MarshalPKCS8PrivateKey(site.TLS.Certificates[0].PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string][]byte{
		"cert": pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: site.Certificate().Raw}),
		"key":  pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key}),
		"hba":  []byte("local all postgres trust\nhost all all all scram-sha-256\n"),
		"none": []byte("not a certificate\n"),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	exec.Command("chown", "-R", localAccount, dir).Run() // for root's server; it fails for others
	server, addr := newTCPServer(t, "ssl=on", "ssl_cert_file="+dir+"/cert", "ssl_key_file="+dir+"/key", "hba_file="+dir+"/hba")
	execSQL(t, server.URL, "CREATE ROLE alice LOGIN PASSWORD 's3cret'")
	execSQL(t, server.URL, "CREATE DATABASE app OWNER alice")
	trust := " sslrootcert=" + dir + "/cert"
	for name, test := range map[string]struct{ url, want string }{ // "plain", "TLS" or what the error has
		"loopback":                             {"", "plain"},
		"another address":                      {"host=0.0.0.0", "TLS"},
		"several hosts":                        {"host=127.0.0.1,0.0.0.0", "TLS"},
		"require, untrusted":                   {"sslmode=require", "TLS"},
		"verify-ca, another host":              {"host=localhost sslmode=verify-ca" + trust, "TLS"},
		"verify-ca, untrusted":                 {"sslmode=verify-ca", "unknown authority"},
		"verify-full":                          {"sslmode=verify-full" + trust, "TLS"},
		"channel_binding":                      {"channel_binding=require sslmode=require" + trust, "TLS"},
		"channel_binding, roots of the system": {"channel_binding=require sslmode=require", "unknown authority"},
		"channel_binding, another host":        {"channel_binding=require host=localhost" + trust, "not localhost"},
		"no such file":                         {"sslmode=verify-full" + trust + "x", "no such file"},
		"no certificate":                       {"sslmode=verify-full sslrootcert=" + dir + "/none", "sslrootcert"},
		"wrong password":                       {"password=s3cret2", `password authentication failed for user "alice"`},
		"wrong password, TLS":                  {"password=s3cret2 sslmode=require", `password authentication failed for user "alice"`},
		"no password":                          {"password=''", "password"},
		"unknown role":                         {"user=bob", `user "bob"`},
		"unknown database":                     {"dbname=unknown", `database "unknown" does not exist`},
		"unknown setting":                      {"foo=bar", `"foo"`},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			url := fmt.Sprintf("host=127.0.0.1 port=%d user=alice password=s3cret dbname=app application_name='%s' %s", addr.Port, name, test.url)
			if test.want != "plain" && test.want != "TLS" {
				wantRefusal(t, url, test.want)
				return
			}
			newAPIOn(t, url, Options{}).create(`{"title":"a"}`)
			encrypted := queryInt(t, server.URL, "SELECT count(DISTINCT ssl) + min(ssl::int) FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) WHERE application_name = $1", name)
			if want := map[string]int{"plain": 1, "TLS": 2}[test.want]; encrypted != want {
				t.Errorf("%d, want %d", encrypted, want)
			}
		})
	}
}

// What PgBouncer refuses stops a start at once, with a message that names it, and
// so does a server without TLS where that is due.
func TestPoolerRefuses(t *testing.T) {
	t.Parallel()
	_, addr := newPooler(t, "app = dbname=postgres "+serverOf(newDatabase(t)), "scram-sha-256")
	for change, want := range map[string]string{
		"password=s3cret2":   "authentication failed",
		"dbname=unknown":     "unknown",
		"user=bob":           "",
		"search_path=public": "search_path",
		"sslmode=require":    "SSL is not enabled on the server (sslmode=disable",
	} {
		wantRefusal(t, fmt.Sprintf("host=127.0.0.1 port=%d user=alice password=s3cret dbname=app %s", addr.Port, change), want)
	}
}

// Of several hosts one that is silent, as after a loss of power, delays each
// connection, but not until the request's deadline.
func TestSilentHost(t *testing.T) {
	t.Parallel()
	silent := listen(t, "127.0.0.1:0") // accepts no connection
	defer silent.Close()
	port := fmt.Sprintf("port=%d,", silent.Addr().(*net.TCPAddr).Port)
	a := newAPIOn(t, strings.NewReplacer("host=", "host=127.0.0.1,", "port=", port).Replace(newProxy(t, newDatabase(t)).url), Options{})
	conn, err := a.db.Conn(t.Context()) // that of the start: the next one is new
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	a.create(`{"title":"a"}`)
}

// The limit of connecting does not end statements.
func TestConnectTimeout(t *testing.T) {
	t.Parallel()
	for _, limit := range []string{"1", "-1"} { // -1: none
		db := open(t, newDatabase(t)+" connect_timeout="+limit)
		defer db.Close()
		if _, err := db.Exec("SELECT pg_sleep(1.5)"); err != nil {
			t.Errorf("connect_timeout=%s: %v", limit, err)
		}
	}
}

// Only on a direct connection statements are prepared and the session changed.
func TestPrepareAuto(t *testing.T) {
	t.Parallel()
	server, addr := newTCPServer(t)
	gone := freeAddr(t).Port
	at := func(hosts string, ports ...int) string {
		list := strings.ReplaceAll(strings.Trim(fmt.Sprint(ports), "[]"), " ", ",")
		return fmt.Sprintf("host=%s port=%s user=postgres dbname=postgres sslmode=disable", hosts, list)
	}
	type test struct {
		name, url string
		mode      string
		prepared  bool
	}
	tests := []test{
		{"127.0.0.1", at("127.0.0.1", addr.Port), "auto", true},
		{"localhost", at("localhost", addr.Port), "auto", true},
		{"mapped IPv4", at("::ffff:127.0.0.1", addr.Port), "auto", true},
		{"second host", at("127.0.0.1,localhost", gone, addr.Port), "auto", true},
		{"never", at("127.0.0.1", addr.Port), "false", false},
		{"socket", server.URL, "auto", false},
		{"socket, always", server.URL, "true", true},
		{"proxy", newProxy(t, server.URL).url, "auto", false},
	}
	for _, url := range []string{at("127.0.0.1", addr.Port), server.URL} {
		dir, pooler := newPooler(t, "* = "+serverOf(url), "any")
		tests = append(tests,
			test{"PgBouncer on TCP to " + url, at("127.0.0.1", pooler.Port), "auto", false},
			test{"PgBouncer on a socket to " + url, at(dir, pooler.Port), "auto", false},
			test{"second host is PgBouncer to " + url, at("127.0.0.1,127.0.0.1", gone, pooler.Port), "auto", false})
	}
	if listener, err := net.Listen("tcp", "[::1]:0"); err == nil { // where there is IPv6
		listener.Close()
		tests = append(tests, test{"::1", at("::1", addr.Port), "auto", true})
	}
	for _, test := range tests {
		db, err := openDB(test.url, test.mode)
		if err != nil {
			t.Fatal(err)
		}
		defer db.Close()
		db.SetMaxOpenConns(1)
		want := "0 on auto"
		if test.prepared {
			want = "1 off force_generic_plan"
		}
		for range 2 { // the second time without a look
			var got string
			err = db.QueryRow(`SELECT concat_ws(' ', count(*), current_setting('enable_sort'), current_setting('plan_cache_mode'))
				FROM pg_prepared_statements WHERE $1 <> ''`, "x").Scan(&got)
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
	db, err := openDB(dbURL, "true")
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
	if _, err := db.Prepare("SELECT 1"); err == nil || !strings.Contains(err.Error(), "not supported") {
		t.Errorf("Prepare: %v", err)
	}
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
	inBothModes(t, func(t *testing.T, mode string) {
		dbURL := newDatabase(t)
		execSQL(t, dbURL, "CREATE TABLE a (n int); CREATE FUNCTION f() RETURNS int LANGUAGE sql AS 'INSERT INTO a DEFAULT VALUES RETURNING 1'")
		p := newProxy(t, dbURL)
		executed := 0
		lose := func(way, statement string, f fault) error {
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
				for f := cutBefore; f < stall; f++ {
					if err := lose(way, statement, f); err == nil && f != cutWithin || err != nil && !transient(err) {
						t.Errorf("%s %s, %v: %v", way, statement, f, err)
					}
					if f.executed() {
						executed++
					}
					p.wait()
					if n := queryInt(t, dbURL, "SELECT count(*) FROM a"); n != executed {
						t.Fatalf("%s %s, %v: there are %d rows, not %d", way, statement, f, n, executed)
					}
				}
			}
		}
	})
}

// The end of its context, which need not have a deadline, ends any call on a
// server that has fallen silent, and the pool goes on with another connection.
// connect_timeout ends connecting, also when only the last look is not answered.
func TestSilentServer(t *testing.T) {
	t.Parallel()
	dbURL := newDatabase(t)
	ping := func(ctx context.Context, db *sql.DB, _ *sql.Tx) error { return db.PingContext(ctx) }
	for name, call := range map[string]func(context.Context, *sql.DB, *sql.Tx) error{
		"Exec": func(ctx context.Context, db *sql.DB, _ *sql.Tx) error {
			_, err := db.ExecContext(ctx, "SELECT 1")
			return err
		},
		"Query": func(ctx context.Context, db *sql.DB, _ *sql.Tx) error {
			return db.QueryRowContext(ctx, "SELECT $1::int", 1).Scan(new(int))
		},
		"Begin":           func(ctx context.Context, db *sql.DB, _ *sql.Tx) error { _, err := db.BeginTx(ctx, nil); return err },
		"Commit":          func(_ context.Context, _ *sql.DB, tx *sql.Tx) error { return tx.Commit() },
		"Ping":            ping,
		"Connect":         ping,
		"connect_timeout": ping,
	} {
		for _, f := range []fault{stall, stallEnd} {
			t.Run(fmt.Sprint(name, ",", f), func(t *testing.T) {
				t.Parallel()
				inBothModes(t, func(t *testing.T, mode string) { testSilentServer(t, dbURL, mode, name, f, call) })
			})
		}
	}
}

func testSilentServer(t *testing.T, dbURL string, mode string, name string, f fault, call func(context.Context, *sql.DB, *sql.Tx) error) {
	p := newProxy(t, dbURL)
	url, connected := p.url, name != "Connect" && name != "connect_timeout"
	if name == "connect_timeout" {
		url += " connect_timeout=1"
	}
	db, err := openDB(url, mode)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	db.SetMaxOpenConns(1)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var tx *sql.Tx
	if name == "Commit" {
		tx, err = db.BeginTx(ctx, nil)
	} else if connected {
		err = db.Ping()
	}
	if err != nil {
		t.Fatal(err)
	}
	p.do(func(executes bool) fault {
		if executes == connected {
			return f
		}
		return pass
	})
	ended := make(chan error, 1)
	go func() { ended <- call(ctx, db, tx) }()
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
	db.Close()
	p.wait() // nothing is left of a failure to connect
}

// Clients that leave all at once free their connections, though PostgreSQL ignores
// requests to cancel that arrive before their statements.
func TestLeaveTogether(t *testing.T) {
	t.Parallel()
	if took := cancelTimeout + cancelGrace + closeTimeout; took >= time.Second {
		t.Errorf("leaving may take %v", took)
	}
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
	first, second := newServer(t), newServer(t)
	execSQL(t, first.URL, "CREATE TABLE a (n int)")
	execSQL(t, second.URL, "CREATE TABLE a (n int)")
	p := newProxy(t, first.URL)
	db, direct := open(t, p.url), open(t, second.URL)
	defer db.Close()
	defer direct.Close()
	write := func(db *sql.DB) error { _, err := db.Exec("INSERT INTO a VALUES ($1)", 1); return err }
	(&api{TB: t, db: db}).fillPool()
	execSQL(t, first.URL, "ALTER SYSTEM SET default_transaction_read_only = on")
	execSQL(t, first.URL, "SELECT pg_reload_conf()")
	p.moveTo(second.URL)
	waitFor(t, "the first server to be read-only", func() bool { return sqlState(write(db)) == "25006" })
	together(10, func(int) {
		conn, err := db.Conn(t.Context())
		if err == nil {
			_, err = conn.ExecContext(t.Context(), "INSERT INTO a SELECT 1 FROM pg_sleep(1)") // meanwhile the others take other connections
			conn.Close()
		}
		if err != nil {
			t.Errorf("after the address has moved: %v", err)
		}
	})
	for range 2 {
		execSQL(t, second.URL, "ALTER DATABASE postgres SET default_transaction_read_only = on")
		execSQL(t, second.URL, "SELECT pg_terminate_backend(pid, 30000) FROM pg_stat_activity WHERE datname = 'postgres' AND pid <> pg_backend_pid()")
		for range 3 {
			if err := write(direct); sqlState(err) != "25006" || !transient(err) {
				t.Errorf("a read-only database: %v", err)
			}
		}
		execSQL(t, second.URL, "BEGIN READ WRITE; ALTER DATABASE postgres RESET default_transaction_read_only; COMMIT")
		if err := write(direct); err != nil {
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

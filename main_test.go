package main

// main_test.go runs the whole program: within this process, where [run] is
// enough, and as a process of its own, where exit codes, signals and the working
// directory matter.

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"reflect"
	"regexp"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// settings are environment variables by their names.
type settings map[string]string

func (s settings) get(name string) string { return s[name] }

// service is a run of the program.
type service struct {
	t     testing.TB
	log   *testLog // what it writes to its standard output
	stop  func()   // asks it to stop
	ended chan struct{}
	err   error // of run, once ended
}

// serving returns a run of the program within this process that serves on a
// free port. When the test ends it is stopped.
func serving(t testing.TB, env settings) *service {
	t.Helper()
	s := runWith(t, env)
	s.url()
	return s
}

// runWith returns a run of the program within this process.
func runWith(t testing.TB, env settings, args ...string) *service {
	ctx, cancel := context.WithCancel(context.Background())
	s := &service{t: t, log: &testLog{t: t}, stop: cancel, ended: make(chan struct{})}
	getenv := func(name string) string {
		if value, ok := env[name]; ok || name != "ADDR" {
			return value
		}
		return "127.0.0.1:0"
	}
	go func() {
		defer close(s.ended)
		s.err = run(ctx, args, getenv, s.log)
	}()
	t.Cleanup(func() { cancel(); <-s.ended })
	return s
}

// wait returns what run does.
func (s *service) wait() error {
	s.t.Helper()
	waitFor(s.t, "the end", func() bool {
		select {
		case <-s.ended:
			return true
		default:
			return false
		}
	})
	return s.err
}

// logged waits for a line of the log that matches a regular expression, and
// returns what its first group does.
func (s *service) logged(pattern string) (group string) {
	s.t.Helper()
	re := regexp.MustCompile(pattern)
	waitFor(s.t, "the log to say "+pattern, func() bool {
		if match := re.FindStringSubmatch(s.log.String()); match != nil {
			group = match[len(match)-1]
			return true
		}
		select {
		case <-s.ended:
			s.t.Fatalf("ended (%v) without having logged %s:\n%s", s.err, pattern, s.log)
		default:
		}
		return false
	})
	return group
}

// url waits until the service serves, and returns its URL.
func (s *service) url() string {
	s.t.Helper()
	return s.logged(`(http://[^/ ]+)[^ ]*/api/tasks`)
}

// addr waits until the service serves, and returns its address.
func (s *service) addr() string {
	s.t.Helper()
	return strings.TrimPrefix(s.url(), "http://")
}

// freshly sends each request on a new connection, and follows no redirect.
var freshly = &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: patience,
	CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}

// send returns the answer to a request, and its body. The header may have a Host.
func (s *service) send(method, path, body string, header http.Header) (*http.Response, string) {
	s.t.Helper()
	req, err := http.NewRequest(method, s.url()+path, strings.NewReader(body))
	if err != nil {
		s.t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/json")
	req.Host = cmp.Or(header.Get("Host"), req.Host)
	maps.Copy(req.Header, header)
	resp, err := freshly.Do(req)
	if err != nil {
		s.t.Fatal(err)
	}
	defer resp.Body.Close()
	got, err := io.ReadAll(resp.Body)
	if err != nil {
		s.t.Fatal(err)
	}
	return resp, string(got)
}

// get returns the status and the body of an answer.
func (s *service) get(path string) (int, string) {
	s.t.Helper()
	resp, body := s.send("GET", path, "", nil)
	return resp.StatusCode, body
}

// post creates a task, and returns the answer.
func (s *service) post(title string) *http.Response {
	s.t.Helper()
	resp, body := s.send("POST", "/api/tasks", fmt.Sprintf(`{"title": %q}`, title), nil)
	if resp.StatusCode != http.StatusCreated {
		s.t.Errorf("POST: %s %s", resp.Status, body)
	}
	return resp
}

// heldRequest is a request in flight, for want of the last byte of its body.
type heldRequest struct {
	t testing.TB
	net.Conn
}

func (s *service) hold() *heldRequest {
	s.t.Helper()
	conn, err := net.Dial("tcp", s.addr())
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { conn.Close() })
	const body = `{"title": "held"}`
	fmt.Fprintf(conn, "POST /api/tasks HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s",
		len(body), body[:len(body)-1])
	waitFor(s.t, "a request in flight", func() bool {
		_, page := s.get("/metrics")
		return strings.Contains(page, "\nhttp_requests_in_flight 2\n") // it, and this
	})
	return &heldRequest{s.t, conn}
}

// finish sends the rest, and fails the test unless a task is created.
func (h *heldRequest) finish() {
	h.t.Helper()
	io.WriteString(h, "}")
	if resp, err := http.ReadResponse(bufio.NewReader(h), nil); err != nil || resp.StatusCode != http.StatusCreated {
		h.t.Errorf("the request in flight: %v, %v", resp, err)
	}
}

// program makes the program, once, and returns its path.
var program = sync.OnceValues(func() (string, error) {
	testServer.Lock()
	defer testServer.Unlock()
	if err := startServer(); err != nil {
		return "", err
	}
	path := filepath.Join(testServer.dir, "tasks.exe") // is removed with that directory
	out, err := exec.Command("go", "build", "-buildvcs=false", buildFlag(), "-o", path, ".").CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("go build: %w\n%s", err, out)
	}
	return path, nil
})

// buildFlag asks for the race detector if this test has it: what has been
// compiled for the test need then not be compiled again.
func buildFlag() string {
	info, _ := debug.ReadBuildInfo()
	return fmt.Sprintf("-race=%t", slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"}))
}

// process is a run of the program as a process.
type process struct {
	service
	*exec.Cmd
	stderr testLog
}

// start returns a run of the program as a process, with no environment but env,
// in the directory dir, or in one where it cannot do without DATABASE_URL.
func start(t testing.TB, dir string, env settings, args ...string) *process {
	t.Helper()
	p := prepare(t, dir, env, args...)
	p.begin()
	return p
}

// prepare returns a process that has not begun.
func prepare(t testing.TB, dir string, env settings, args ...string) *process {
	t.Helper()
	path, err := program()
	if err != nil {
		t.Fatal(err)
	}
	p := &process{Cmd: exec.Command(path, args...), stderr: testLog{t: t}}
	p.service = service{t: t, log: &testLog{t: t}, stop: func() { p.signal(syscall.SIGTERM) }, ended: make(chan struct{})}
	p.Dir, p.Stdout, p.Stderr = dir, p.service.log, &p.stderr
	for _, name := range []string{"PATH", "HOME", "TMPDIR", "PG_BIN"} {
		p.Env = append(p.Env, name+"="+os.Getenv(name))
	}
	if _, ok := env["ADDR"]; !ok {
		p.Env = append(p.Env, "ADDR=127.0.0.1:0")
	}
	for name, value := range env {
		p.Env = append(p.Env, name+"="+value)
	}
	return p
}

func (p *process) begin() {
	p.t.Helper()
	if err := p.Start(); err != nil {
		p.t.Fatal(err)
	}
	go func() {
		defer close(p.ended)
		p.err = p.Cmd.Wait()
	}()
	p.t.Cleanup(func() { p.Process.Kill(); <-p.ended })
}

// signal sends a signal.
func (p *process) signal(sig os.Signal) {
	p.t.Helper()
	if err := p.Process.Signal(sig); err != nil {
		p.t.Fatal(err)
	}
}

// exit waits until the process has ended, and fails the test unless its code is
// the given one. It returns the standard error.
func (p *process) exit(code int) string {
	p.t.Helper()
	p.service.wait()
	if got := p.ProcessState.ExitCode(); got != code {
		p.t.Errorf("%v, want exit code %d\n%s%s", p.ProcessState, code, p.service.log, &p.stderr)
	}
	return p.stderr.String()
}

// Every variable has its line in the help, with its default, and its row in the
// README.
func TestHelp(t *testing.T) {
	t.Parallel()
	help := runWith(t, nil, "-h")
	if err := help.wait(); err != nil {
		t.Error(err)
	}
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	if warning := "destroys data"; !strings.Contains(help.log.String(), warning) || !bytes.Contains(readme, []byte(warning)) {
		t.Error("nothing warns of DB_PREPARE=true")
	}
	for _, v := range variables(new(config)) {
		line := regexp.MustCompile(`(?m)^  ` + v.name + ` +\S.*$`).FindString(help.log.String())
		if line == "" || v.byDefault != "" && !strings.HasSuffix(line, "("+v.byDefault+")") {
			t.Errorf("in the help %s is %q, want its default %q in parentheses", v.name, line, v.byDefault)
		}
		if !bytes.Contains(readme, []byte("| `"+v.name+"` |")) {
			t.Errorf("the README has no `%s`", v.name)
		}
	}
}

// A private server that cannot be stopped is an error.
func TestStopFails(t *testing.T) {
	t.Parallel()
	dir := newLocalDir(t)
	db, bin := &localDB{dir: dir, bin: os.Getenv("PG_BIN")}, shortTempDir(t)
	err := db.findPrograms(t.Context())
	for _, name := range []string{"initdb", "postgres"} {
		err = errors.Join(err, os.Symlink(filepath.Join(db.bin, name), filepath.Join(bin, name)))
	}
	script := "#!/bin/sh\n[ $1 = start ] && exec " + db.bin + "/pg_ctl \"$@\"\n"
	if err := errors.Join(err, os.WriteFile(filepath.Join(bin, "pg_ctl"), []byte(script), 0o755)); err != nil {
		t.Fatal(err)
	}
	p := start(t, filepath.Dir(dir), settings{"PG_BIN": bin})
	p.url()
	server := db.postmaster()
	p.stop()
	if said := p.exit(1); !strings.Contains(said, "pg_ctl: exit status 1") {
		t.Error(said)
	}
	killServer(t, server)
	os.Remove(filepath.Join(dir, "data", "postmaster.pid"))
}

func TestDefaults(t *testing.T) {
	t.Parallel()
	cfg, err := configure(settings{}.get, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	log := cfg.options.Logger
	if log.Enabled(t.Context(), -1) || !log.Enabled(t.Context(), 0) {
		t.Error("the level of the log is not info")
	}
	cfg.options.Logger, cfg.hints = nil, nil
	want := config{prepare: "auto", addr: "localhost:8080", maxConns: 10, shutdownTimeout: 10 * time.Second, logLevel: "info", logFormat: "text",
		options: Options{RequestTimeout: 5 * time.Second, MaxInFlight: 1000, Hosts: []string{}, CORSOrigins: []string{}}}
	if !reflect.DeepEqual(cfg, want) {
		t.Errorf("got %+v, want %+v", cfg, want)
	}
	if maxRequestTimeout >= writeTimeout {
		t.Errorf("REQUEST_TIMEOUT may be %v, but connections end after %v", maxRequestTimeout, writeTimeout)
	}
}

func TestInvalidSettings(t *testing.T) {
	t.Parallel()
	const number, duration = "0 -1 1.5 x 99999999999999999999", "0 -1s 5 x 99999h"
	for name, values := range map[string]string{
		"ADDR":             "localhost 8080 localhost: localhost:http localhost:65536 localhost:-1 ::1:8080",
		"PORT":             "x -1 65536 +80 :8080 localhost:8080",
		"DB_MAX_CONNS":     number + " 10001",
		"DB_PREPARE":       "x 2 TRUE",
		"REQUEST_TIMEOUT":  duration + " 46s",
		"MAX_IN_FLIGHT":    number + " 1000001",
		"SHUTDOWN_TIMEOUT": duration + " 61m",
		"SHUTDOWN_DELAY":   "-1s 5 x 61m",
		"USER_HEADER":      "X:User é Bücher",
		"ALLOWED_HOSTS":    ", example.com:80 https://example.com a/b [::1]:80 bücher.example a,b:1",
		"PATH_PREFIX":      "/ /%zz todo todo/ /todo/ //todo /a//b /a?b /a#b /<a> /é",
		"CORS_ORIGINS":     ", example.com https://example.com/ https://example.com/a https://u@example.com null https://a.example,b.example http:// *.example.com https://*.example.com https://Example.com https://example.com:443 http://example.com:80 https://example.com: https://example.com:0 https://bücher.example",
		"PG_BIN":           "/nonexistent",
		"LOG_LEVEL":        "x 1 warning error+100",
		"LOG_FORMAT":       "x JSON",
	} {
		for value := range strings.FieldsSeq(values) {
			_, err := configure(settings{name: value}.get, io.Discard)
			if err == nil || !strings.HasPrefix(err.Error(), name+" ") || !strings.Contains(err.Error(), strconv.Quote(value)) {
				t.Errorf("%s=%s: %v", name, value, err)
			}
		}
	}
	if _, err := configure(settings{"USER_HEADER": " "}.get, io.Discard); err == nil {
		t.Error("a blank USER_HEADER means that nothing authenticates")
	}
}

func TestValidSettings(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name      string
		env       settings
		addr, url string
	}{
		{"neither", settings{}, "localhost:8080", "http://localhost:8080"},
		{"ADDR", settings{"ADDR": "127.0.0.1:80"}, "127.0.0.1:80", "http://127.0.0.1:80"},
		{"ADDR without a host", settings{"ADDR": ":80"}, ":80", "http://localhost:80"},
		{"ADDR of all interfaces", settings{"ADDR": "0.0.0.0:80"}, "0.0.0.0:80", "http://localhost:80"},
		{"ADDR of IPv6", settings{"ADDR": "[::1]:80"}, "[::1]:80", "http://[::1]:80"},
		{"ADDR of all IPv6 interfaces", settings{"ADDR": "[::]:80"}, "[::]:80", "http://localhost:80"},
		{"ADDR and PORT", settings{"ADDR": "localhost:80", "PORT": "81"}, "localhost:80", "http://localhost:80"},
		{"PORT", settings{"PORT": "81"}, ":81", "http://localhost:81"},
		{"ADDR and white space", settings{"ADDR": " localhost:80\n"}, "localhost:80", "http://localhost:80"},
		{"PORT and an empty ADDR", settings{"ADDR": "", "PORT": "81"}, ":81", "http://localhost:81"},
		{"both empty", settings{"ADDR": "", "PORT": ""}, "localhost:8080", "http://localhost:8080"},
		{"limits", settings{"DB_MAX_CONNS": "1", "MAX_IN_FLIGHT": "1000000", "REQUEST_TIMEOUT": "45s", "SHUTDOWN_DELAY": "0s"}, "localhost:8080", "http://localhost:8080"},
		{"one origin", settings{"CORS_ORIGINS": "https://example.com"}, "localhost:8080", "http://localhost:8080"},
		{"origins", settings{"CORS_ORIGINS": " https://example.com, http://localhost:3000,http://[::1]:443, chrome-extension://abc,https://xn--bcher-kva.example:8443,"}, "localhost:8080", "http://localhost:8080"},
	} {
		cfg, err := configure(test.env.get, io.Discard)
		if err != nil || cfg.addr != test.addr || "http://"+reachable(cfg.addr) != test.url {
			t.Errorf("%s: addr %s, url %s, error %v; want %s, %s", test.name, cfg.addr, "http://"+reachable(cfg.addr), err, test.addr, test.url)
		}
	}
}

func TestInvalidDatabaseURL(t *testing.T) {
	t.Parallel()
	for _, url := range []string{
		"s3cret",
		"postgres://alice:s3cret@host:port/db",
		"postgres://alice:s3cret@host:99999/db",
		"postgres://alice:s3cret/x@host/db",
		"postgres://alice:s3cret#x@host/db",
		"postgres://alice:s3%cret@host/db",
		"postgres://alice:s3cret@ho st/db",
		"postgres://alice:s3cret@host/db?sslmode=no",
		"postgres://alice:s3cret@host/db?channel_binding=no",
		"postgresql+psycopg2://alice:s3cret@localhost/db",
		"postgresql+psycopg2://alice:s3cret@localhost/db?sslmode=require",
		"'postgres://alice:s3cret@localhost/db?sslmode=require'",
		"psql 'postgres://alice:s3cret@localhost/db?sslmode=require'",
		"mysql://alice:s3cret@localhost/db?a=b",
		"host=localhost password=s3cret sslmode=no",
		"host=localhost password=my s3cret",
		"host=localhost password='s3cret",
		"host=localhost port=no password=s3cret",
		"host=localhost password=s3cret\\",
	} {
		s := runWith(t, settings{"DATABASE_URL": url})
		err := s.wait()
		if _, ok := err.(usageError); !ok || !strings.HasPrefix(err.Error(), "DATABASE_URL: ") {
			t.Errorf("%s: %#v", url, err)
		}
		if said := fmt.Sprint(err, s.log); strings.Contains(said, "s3cret") || strings.Contains(said, "not ready") {
			t.Errorf("%s: %s", url, said)
		}
	}
}

func TestExitCodes(t *testing.T) {
	t.Parallel()
	running := serving(t, settings{"DATABASE_URL": newDatabase(t)})
	ill := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Host != "localhost" || r.URL.Path != "/healthz" {
			t.Errorf("asked for %s of %s", r.URL, r.Host)
		}
		w.WriteHeader(http.StatusServiceUnavailable)
	}))
	t.Cleanup(ill.Close)
	for _, test := range []struct {
		name string
		args []string
		env  settings
		want int
		says string // on the standard error
	}{
		{"help", []string{"-h"}, nil, 0, `^$`},
		{"help comes before settings", []string{"-help"}, settings{"LOG_LEVEL": "x"}, 0, `^$`},
		{"unknown flag", []string{"-port", "80"}, nil, 2, `^tasks: .*-port`},
		{"argument", []string{"serve"}, nil, 2, `^tasks: unexpected argument "serve".*-h`},
		{"invalid setting", nil, settings{"DB_MAX_CONNS": "many"}, 2, `^tasks: DB_MAX_CONNS is "many"; it must be a number`},
		{"invalid DATABASE_URL", nil, settings{"DATABASE_URL": "x"}, 2, `^tasks: DATABASE_URL: `},
		{"port in use", nil, settings{"DATABASE_URL": newDatabase(t), "ADDR": running.addr()}, 1, `^tasks: .*address already in use \(ADDR or PORT chooses another address\)`},
		{"no such database", nil, settings{"DATABASE_URL": newDatabase(t) + " dbname=unknown"}, 1, `^tasks: .*"unknown" does not exist`},
		{"not healthy", []string{"-healthcheck"}, settings{"ADDR": ill.Listener.Addr().String()}, 1, `^tasks: .* answered 503`},
		{"healthy", []string{"-healthcheck"}, settings{"ADDR": running.addr()}, 0, `^$`},
		{"not running", []string{"-healthcheck"}, settings{"ADDR": "127.0.0.1:1"}, 1, `^tasks: .*connection refused`},
		{"no such address", []string{"-healthcheck"}, settings{"ADDR": "a b:1"}, 1, `^tasks: .*a b`},
		{"not by a proxy", []string{"-healthcheck"}, settings{"ADDR": "192.0.2.1:80", "HTTP_PROXY": running.url()}, 1, `^tasks: Get "http://192.0.2.1:80/`},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			if got := start(t, t.TempDir(), test.env, test.args...).exit(test.want); !regexp.MustCompile(test.says).MatchString(got) {
				t.Errorf("said %q, want %s", got, test.says)
			}
		})
	}
}

func TestStartBeforeDatabase(t *testing.T) {
	t.Parallel()
	dbURL := newDatabase(t)
	listener := listen(t, "127.0.0.1:0")
	listener.Close()
	s := runWith(t, settings{"DATABASE_URL": onTCP(dbURL, listener.Addr())})
	s.logged("level=WARN .*not ready yet.*connection refused")
	relay(t, listen(t, listener.Addr().String()), dbURL, io.Discard)
	if status, body := s.get("/readyz"); status != http.StatusOK {
		t.Errorf("%d %s", status, body)
	}
}

func TestStopBeforeDatabase(t *testing.T) {
	t.Parallel()
	for line, url := range map[string]string{"not ready yet": "host=127.0.0.1 port=1 user=alice", "starting a private PostgreSQL": ""} {
		p := start(t, filepath.Dir(newLocalDir(t)), settings{"DATABASE_URL": url})
		p.logged(line)
		p.signal(os.Interrupt)
		if said := p.exit(0); said != "" {
			t.Errorf("after %q it said %q", line, said)
		}
	}
}

func TestUserHeader(t *testing.T) {
	t.Parallel()
	s := serving(t, settings{"DATABASE_URL": newDatabase(t), "USER_HEADER": "X-Forwarded-User"})
	for _, test := range []struct {
		users []string // one a field
		want  int
	}{
		{[]string{"alice"}, 200}, {[]string{"bob"}, 403}, {nil, 401}, {[]string{""}, 401}, {[]string{"alice", "alice"}, 401}, {[]string{"", "alice"}, 401},
	} {
		resp, body := s.send("GET", "/api/tasks?user_id=alice", "", http.Header{"X-Forwarded-User": test.users})
		if resp.StatusCode != test.want {
			t.Errorf("%q: %d %s, want %d", test.users, resp.StatusCode, body, test.want)
		}
	}
}

// A service on a loopback address serves few hosts by default.
func TestAllowedHosts(t *testing.T) {
	t.Parallel()
	dbURL := newDatabase(t)
	for _, test := range []struct{ addr, allowed, served, refused string }{
		{":0", "", "localhost evil.example:8080", ""},
		{"", "", "localhost LOCALHOST.:1 a.localhost 127.0.0.1:80 192.0.2.1 [::1]:80", "example.com evil.example:8080 localhost.example"},
		{"", "Example.com., b.example", "example.com:80 EXAMPLE.COM b.example. localhost 192.0.2.1", "a.example.com evil.example"},
		{"", "*", "localhost evil.example:8080", ""},
	} {
		s := serving(t, settings{"DATABASE_URL": dbURL, "ADDR": cmp.Or(test.addr, "127.0.0.1:0"), "ALLOWED_HOSTS": test.allowed})
		for want, hosts := range map[int]string{http.StatusOK: test.served, http.StatusMisdirectedRequest: test.refused} {
			for host := range strings.FieldsSeq(hosts) {
				if resp, body := s.send("GET", "/api/tasks", "", http.Header{"Host": {host}}); resp.StatusCode != want {
					t.Errorf("ALLOWED_HOSTS=%q, Host: %s: %d %s, want %d", test.allowed, host, resp.StatusCode, body, want)
				}
			}
		}
	}
}

func TestPathPrefix(t *testing.T) {
	t.Parallel()
	s := serving(t, settings{"DATABASE_URL": newDatabase(t), "PATH_PREFIX": "/todo"})
	s.logged("msg=serving url=" + s.url() + "/todo/api/tasks docs=" + s.url() + "/todo/docs\n")
	s.logged("Try: curl -i " + s.url() + "/todo/api/tasks ")
	created, second := s.post("first"), s.post("second")
	list, _ := s.send("GET", "/api/tasks?limit=1", "", nil)
	root, _ := s.send("GET", "/", "", nil)
	id := `/todo/api/tasks/[-0-9a-f]{36} `
	got := strings.Join([]string{created.Header.Get("Location"), second.Header.Get("Location"), root.Header.Get("Location"), list.Header.Get("Link")}, " ")
	if !regexp.MustCompile("^" + id + id + "/todo/docs </todo/api/tasks[?]after=").MatchString(got) {
		t.Error(got)
	}
}

// DB_PREPARE decides whether a connection sets its session up to prepare, and
// whether it first asks if it is direct.
func TestDBPrepare(t *testing.T) {
	t.Parallel()
	dbURL := newDatabase(t)
	const always, direct = "('jit', 'off')) AS settings (name, value)", "('jit', 'off')) AS settings (name, value) WHERE (inet"
	for mode, want := range map[string]string{"": direct, "auto": direct, "true": always, "false": ""} {
		listener, sent := listen(t, "127.0.0.1:0"), &testLog{t: t}
		relay(t, listener, dbURL, sent)
		serving(t, settings{"DATABASE_URL": onTCP(dbURL, listener.Addr()), "DB_PREPARE": mode})
		if got := regexp.MustCompile(`\('jit'.* AS settings \(name, value\)( WHERE \(inet)?`).FindString(sent.String()); got != want {
			t.Errorf("DB_PREPARE=%s: %q, want %q", mode, got, want)
		}
	}
}

// The collector is tuned unless the environment does it.
func TestGCPercent(t *testing.T) {
	t.Parallel()
	dbURL := newDatabase(t)
	for _, test := range []struct {
		name, value string
		tuned       bool
	}{{"GOGC", "", true}, {"GOGC", "100", false}, {"GOMEMLIMIT", "8GiB", false}} {
		_, page := start(t, t.TempDir(), settings{"DATABASE_URL": dbURL, test.name: test.value}).get("/metrics")
		const least = 10 << 20 // bytes of the heap before the first collection; 4 << 20 by default
		if next := parseMetrics(t, []byte(page))["go_memstats_next_gc_bytes"]; (next >= least) != test.tuned {
			t.Errorf("%s=%s: the heap may grow to %v bytes", test.name, test.value, next)
		}
	}
}

func TestLogs(t *testing.T) {
	t.Parallel()
	const hint = `Try: curl -i http://127.0.0.1:PORT/api/tasks -H 'Content-Type: application/json' -d '{"title": "Buy milk"}'` + "\n"
	for _, test := range []struct {
		name string
		env  settings
		want string // without what differs from run to run
	}{
		{"text", settings{}, `time=T level=INFO msg=serving url=http://127.0.0.1:PORT/api/tasks docs=http://127.0.0.1:PORT/docs
` + hint + `time=T level=INFO msg=request method=GET route=/api/tasks/{id} status=404 duration_ms=D bytes=N request_id=mine
time=T level=INFO msg=stopping
`},
		{"json", settings{"LOG_FORMAT": "json"}, `{"time":"T","level":"INFO","msg":"serving","url":"http://127.0.0.1:PORT/api/tasks","docs":"http://127.0.0.1:PORT/docs"}
{"time":"T","level":"INFO","msg":"request","method":"GET","route":"/api/tasks/{id}","status":404,"duration_ms":D,"bytes":N,"request_id":"mine"}
{"time":"T","level":"INFO","msg":"stopping"}
`},
		{"warnings only", settings{"LOG_LEVEL": "warn"}, hint},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			test.env["DATABASE_URL"] = newDatabase(t) + " password=s3cret"
			s := serving(t, test.env)
			s.send("GET", "/api/tasks/s3cret?user_id=s3cret", "s3cret", http.Header{"X-Request-Id": {"mine"}})
			s.stop()
			if err := s.wait(); err != nil {
				t.Error(err)
			}
			got := s.log.String()
			for line := range strings.Lines(got) {
				if test.env["LOG_FORMAT"] == "json" && !json.Valid([]byte(line)) {
					t.Errorf("not JSON: %s", line)
				}
			}
			for pattern, placeholder := range map[string]string{
				`(time\W+)20[-0-9]+T[.:0-9]+Z`: "${1}T",
				`(127\.0\.0\.1:)\d+`:           "${1}PORT",
				`(duration_ms\W+)[.0-9]+`:      "${1}D",
				`(bytes\W+)\d+`:                "${1}N",
			} {
				got = regexp.MustCompile(pattern).ReplaceAllString(got, placeholder)
			}
			if got != test.want {
				t.Errorf("got\n%swant\n%s", got, test.want)
			}
		})
	}
}

// A reader of the log that goes, or that stops reading, neither ends the service
// nor holds up its requests and its stop, not even one that fails.
func TestLogWithoutReader(t *testing.T) {
	t.Parallel()
	for _, gone := range []bool{true, false} {
		t.Run(fmt.Sprintf("gone=%t", gone), func(t *testing.T) {
			t.Parallel()
			p := prepare(t, t.TempDir(), settings{"DATABASE_URL": newDatabase(t), "SHUTDOWN_TIMEOUT": "1ms"})
			reader, writer, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			defer reader.Close()
			p.Stdout, p.Stderr = writer, writer
			p.begin()
			writer.Close()
			line, err := bufio.NewReader(reader).ReadString('\n')
			if err != nil {
				t.Fatal(err)
			}
			io.WriteString(p.service.log, line)
			if gone {
				reader.Close()
			}
			for range 1000 { // lines, more than a pipe holds
				if status, _ := p.get("/healthz"); status != http.StatusOK {
					t.Fatalf("status %d", status)
				}
			}
			p.hold()
			if hangup := syscall.SIGHUP; gone && !signal.Ignored(hangup) { // the terminal is closed
				for range 5 { // bash and the kernel both send it
					p.signal(hangup)
				}
			} else {
				p.signal(syscall.SIGTERM)
			}
			p.exit(1)
		})
	}
}

// A log that takes no lines does not block its writer.
func TestLogFull(t *testing.T) {
	t.Parallel()
	reader, writer := io.Pipe()
	defer reader.Close()
	log, _ := newLogWriter(writer)
	for range 20_000 {
		log.Write([]byte("line\n"))
	}
}

// A signal stops the program once SHUTDOWN_DELAY has passed and the request in
// flight has been answered, or when SHUTDOWN_TIMEOUT has passed. A second one
// ends it.
func TestStop(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name, delay, timeout string
		then                 func(p *process, held *heldRequest)
		code                 int
		says                 string // on the standard error
	}{
		{"finish", "", "1h", func(p *process, held *heldRequest) {
			waitFor(p.t, "/readyz to be 503", func() bool { status, _ := p.get("/readyz"); return status == http.StatusServiceUnavailable })
			held.finish()
		}, 0, "^$"},
		{"delay", "5s", "1h", func(p *process, held *heldRequest) {
			held.finish()
			waitFor(p.t, "/readyz to be 503 on a connection that is kept", func() bool {
				resp, err := http.Get(p.url() + "/readyz")
				if err != nil {
					p.t.Fatal(err)
				}
				resp.Body.Close()
				return resp.StatusCode == http.StatusServiceUnavailable && !resp.Close
			})
			p.post("in the delay")
		}, 0, "^$"},
		{"delay longer than the timeout", "2s", "1s", func(_ *process, held *heldRequest) { held.finish() }, 0, "^$"},
		{"timeout", "", "200ms", func(*process, *heldRequest) {}, 1, "^tasks: requests were still in flight after 200ms"},
		{"second signal", "1h", "1h", func(p *process, _ *heldRequest) { p.signal(syscall.SIGTERM) }, -1, "^$"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			p := start(t, t.TempDir(), settings{"DATABASE_URL": newDatabase(t), "SHUTDOWN_DELAY": test.delay, "SHUTDOWN_TIMEOUT": test.timeout, "REQUEST_TIMEOUT": "45s"})
			held := p.hold()
			p.signal(syscall.SIGTERM)
			p.logged("msg=stopping")
			test.then(p, held)
			if said := p.exit(test.code); !regexp.MustCompile(test.says).MatchString(said) {
				t.Errorf("said %q, want %s", said, test.says)
			}
			if test.code >= 0 { // a request that is cut off is logged, too
				p.logged("route=/api/tasks ")
			}
		})
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

// From nothing to a server of its own, whose data outlast stops and crashes.
func TestPrivatePostgreSQL(t *testing.T) {
	t.Parallel()
	dir := newLocalDir(t)
	server := func() postmaster { return (&localDB{dir: dir}).postmaster() }
	// What libpq would take from the environment is about another server.
	env := settings{"PGHOSTADDR": "192.0.2.1", "PGCHANNELBINDING": "require", "PGOPTIONS": "-c foo=bar", "DB_MAX_CONNS": "200"}
	want := ""
	var running postmaster
	for _, step := range []struct{ before, title string }{{"nothing", "made first"}, {"a crash", "made after a crash"}, {"a stop", "made after a stop"}} {
		p := start(t, filepath.Dir(dir), env)
		_, body := p.get("/api/tasks")
		if got := strings.Join(regexp.MustCompile("made [a-z ]*").FindAllString(body, -1), ", "); got != want {
			t.Errorf("after %s the tasks are %q, want %q", step.before, got, want)
		}
		p.post(step.title)
		if _, page := p.get("/metrics"); !strings.Contains(page, "go_sql_max_open_connections 200\n") {
			t.Error("DB_MAX_CONNS has no effect")
		}
		if n := queryLocal(t, fmt.Sprintf("host=%s user=postgres", server().sockets), "SHOW max_connections"); n != "210" {
			t.Errorf("max_connections is %s", n)
		}
		// This address is the machine's own too, on Linux.
		if conn, err := net.DialTimeout("tcp", strings.Replace(p.addr(), "127.0.0.1", "127.0.0.2", 1), time.Second); err == nil {
			conn.Close()
			t.Error("it listens on all addresses")
		}
		want = strings.TrimPrefix(want+", "+step.title, ", ")
		if step.before == "nothing" {
			running = server()
			p.Process.Kill()
			p.exit(-1)
			continue
		}
		if got := server(); (got == running) != (step.before == "a crash") {
			t.Errorf("after %s the server is %+v, and was %+v", step.before, got, running)
		}
		p.signal(os.Interrupt)
		p.exit(0)
		if got := server(); got != (postmaster{}) {
			t.Errorf("%+v is running", got)
		}
	}
}

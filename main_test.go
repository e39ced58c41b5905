package main

// main_test.go runs the whole program: within this process, where [run] is
// enough, and as a process of its own, where exit codes, signals and the working
// directory matter. Then it takes the code along into another module.

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"runtime"
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
	return s.logged(`(http://[^/ ]+)/api/tasks`)
}

// addr waits until the service serves, and returns its address.
func (s *service) addr() string {
	s.t.Helper()
	return strings.TrimPrefix(s.url(), "http://")
}

// freshly sends each request on a new connection.
var freshly = &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: patience}

// get returns the status and the body of an answer.
func (s *service) get(path string) (int, string) {
	s.t.Helper()
	resp, err := freshly.Get(s.url() + path)
	if err != nil {
		s.t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		s.t.Fatal(err)
	}
	return resp.StatusCode, string(body)
}

// post creates a task.
func (s *service) post(title string) {
	s.t.Helper()
	resp, err := freshly.Post(s.url()+"/api/tasks", "application/json", strings.NewReader(fmt.Sprintf(`{"title": %q}`, title)))
	if err != nil {
		s.t.Error(err)
		return
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusCreated {
		s.t.Errorf("POST: %s", resp.Status)
	}
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

// finish sends the rest, and returns the status of the answer.
func (h *heldRequest) finish() int {
	h.t.Helper()
	io.WriteString(h, "}")
	resp, err := http.ReadResponse(bufio.NewReader(h), nil)
	if err != nil {
		h.t.Fatal(err)
	}
	return resp.StatusCode
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
	for _, v := range variables() {
		line := regexp.MustCompile(`(?m)^  ` + v.name + ` +\S.*$`).FindString(help.log.String())
		if line == "" || v.byDefault != "" && !strings.HasSuffix(line, "("+v.byDefault+")") {
			t.Errorf("in the help %s is %q, want its default %q in parentheses", v.name, line, v.byDefault)
		}
		if !bytes.Contains(readme, []byte("| `"+v.name+"` |")) {
			t.Errorf("the README has no `%s`", v.name)
		}
	}
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
	want := config{addr: "localhost:8080", maxConns: 10, shutdownTimeout: 10 * time.Second, logFormat: "text",
		options: Options{RequestTimeout: 5 * time.Second, MaxInFlight: 1000}}
	if !reflect.DeepEqual(cfg, want) {
		t.Errorf("got %+v, want %+v", cfg, want)
	}
}

func TestInvalidSettings(t *testing.T) {
	t.Parallel()
	const number, duration = "0 -1 1.5 x 99999999999999999999", "0 -1s 5 x 99999h"
	for name, values := range map[string]string{
		"ADDR":             "localhost 8080 localhost: localhost:http localhost:65536 localhost:-1 ::1:8080",
		"PORT":             "x -1 65536 +80 :8080 localhost:8080",
		"DB_MAX_CONNS":     number + " 10001",
		"DB_PREPARE":       "x 2",
		"REQUEST_TIMEOUT":  duration + " 51s",
		"MAX_IN_FLIGHT":    number + " 1000001",
		"SHUTDOWN_TIMEOUT": duration + " 61m",
		"SHUTDOWN_DELAY":   "-1s 5 x 61m",
		"USER_HEADER":      "X:User é Bücher",
		"ALLOWED_HOSTS":    "example.com:80 https://example.com a/b [::1]:80 bücher.example a,b:1",
		"PATH_PREFIX":      "/ todo todo/ /todo/ //todo /a//b /a?b /a#b /<a> /é",
		"CORS_ORIGINS":     "example.com https://example.com/ https://example.com/a https://u@example.com null https://a.example,b.example http:// *.example.com https://*.example.com https://Example.com https://example.com:443 http://example.com:80 https://example.com: https://example.com:0 https://bücher.example",
		"LOG_LEVEL":        "x 1 warning",
		"LOG_FORMAT":       "x JSON",
	} {
		for value := range strings.FieldsSeq(values) {
			_, err := configure(settings{name: value}.get, io.Discard)
			if err == nil || !strings.HasPrefix(err.Error(), name+" ") || !strings.Contains(err.Error(), strconv.Quote(value)) {
				t.Errorf("%s=%s: %v", name, value, err)
			}
		}
	}
}

func TestValidSettings(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name string
		env  settings
		addr string
		url  string
	}{
		{"neither", settings{}, "localhost:8080", "http://localhost:8080"},
		{"ADDR", settings{"ADDR": "127.0.0.1:80"}, "127.0.0.1:80", "http://127.0.0.1:80"},
		{"ADDR without a host", settings{"ADDR": ":80"}, ":80", "http://localhost:80"},
		{"ADDR of all interfaces", settings{"ADDR": "0.0.0.0:80"}, "0.0.0.0:80", "http://localhost:80"},
		{"ADDR of IPv6", settings{"ADDR": "[::1]:80"}, "[::1]:80", "http://[::1]:80"},
		{"ADDR of all IPv6 interfaces", settings{"ADDR": "[::]:80"}, "[::]:80", "http://localhost:80"},
		{"ADDR and PORT", settings{"ADDR": "localhost:80", "PORT": "81"}, "localhost:80", "http://localhost:80"},
		{"PORT", settings{"PORT": "81"}, ":81", "http://localhost:81"},
		{"PORT and an empty ADDR", settings{"ADDR": "", "PORT": "81"}, ":81", "http://localhost:81"},
		{"both empty", settings{"ADDR": "", "PORT": ""}, "localhost:8080", "http://localhost:8080"},
		{"one origin", settings{"CORS_ORIGINS": "https://example.com"}, "localhost:8080", "http://localhost:8080"},
		{"origins", settings{"CORS_ORIGINS": " https://example.com, http://localhost:3000,http://[::1]:443, chrome-extension://abc,https://xn--bcher-kva.example:8443,"}, "localhost:8080", "http://localhost:8080"},
	} {
		cfg, err := configure(test.env.get, io.Discard)
		if err != nil || cfg.addr != test.addr || serviceURL(cfg.addr) != test.url {
			t.Errorf("%s: addr %s, url %s, error %v; want %s, %s", test.name, cfg.addr, serviceURL(cfg.addr), err, test.addr, test.url)
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
		{"healthy", []string{"-healthcheck"}, settings{"ADDR": running.addr()}, 0, `^$`},
		{"not healthy", []string{"-healthcheck"}, settings{"ADDR": "127.0.0.1:1"}, 1, `^tasks: .*connection refused`},
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
	for _, sig := range []os.Signal{os.Interrupt, syscall.SIGTERM} {
		t.Run(sig.String(), func(t *testing.T) {
			t.Parallel()
			p := start(t, t.TempDir(), settings{"DATABASE_URL": "host=127.0.0.1 port=1 user=alice"})
			p.logged("not ready yet")
			p.signal(sig)
			if said := p.exit(0); said != "" {
				t.Errorf("said %q", said)
			}
		})
	}
}

func TestStartTogether(t *testing.T) {
	t.Parallel()
	dbURL := newDatabase(t)
	var instances []*service
	for range 8 {
		instances = append(instances, runWith(t, settings{"DATABASE_URL": dbURL}))
	}
	for i, s := range instances {
		s.post(fmt.Sprint("of instance ", i))
	}
	for _, s := range instances {
		_, body := s.get("/api/tasks")
		if got := strings.Count(body, "of instance "); got != len(instances) {
			t.Errorf("an instance has %d tasks: %s", got, body)
		}
		if log := s.log.String(); strings.Contains(log, "level=WARN") {
			t.Error(log)
		}
	}
}

// A role that may use the table, and do nothing else, is enough for a schema
// that stands.
func TestStartWithoutRights(t *testing.T) {
	t.Parallel()
	var role string
	t.Cleanup(func() { execSQL(t, testServer.URL, "DROP ROLE "+role) }) // after the database
	dbURL := newDatabase(t)
	role = "user_of_" + regexp.MustCompile("dbname=([^ ]*)").FindStringSubmatch(dbURL)[1]
	execSQL(t, dbURL, "CREATE ROLE "+role+" LOGIN")
	execSQL(t, dbURL, "REVOKE CREATE ON SCHEMA public FROM public")
	env := settings{"DATABASE_URL": strings.Replace(dbURL, "user=postgres", "user="+role, 1)}

	if err := runWith(t, env).wait(); err == nil || !strings.Contains(err.Error(), "may not create it") {
		t.Errorf("without a schema: %v", err)
	}
	serving(t, settings{"DATABASE_URL": dbURL}).stop()
	execSQL(t, dbURL, "GRANT SELECT, INSERT, UPDATE, DELETE ON tasks TO "+role)
	serving(t, env).post("by a role without rights")
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
			req, err := http.NewRequest("GET", s.url()+"/api/tasks/s3cret?user_id=s3cret", strings.NewReader("s3cret"))
			if err != nil {
				t.Fatal(err)
			}
			req.Header.Set("X-Request-ID", "mine")
			resp, err := http.DefaultClient.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			resp.Body.Close()
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
// nor holds up its requests and its stop.
func TestLogWithoutReader(t *testing.T) {
	t.Parallel()
	for _, gone := range []bool{true, false} {
		t.Run(fmt.Sprintf("gone=%t", gone), func(t *testing.T) {
			t.Parallel()
			p := prepare(t, t.TempDir(), settings{"DATABASE_URL": newDatabase(t)})
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
			p.signal(syscall.SIGTERM)
			p.exit(0)
		})
	}
}

// The command that the log suggests creates a task when it is pasted into a
// shell.
func TestHint(t *testing.T) {
	t.Parallel()
	s := serving(t, settings{"DATABASE_URL": newDatabase(t)})
	hint := s.logged("Try: (.*)\n")
	// The shell splits the command; the test is the curl.
	out, err := exec.Command("sh", "-c", `curl() { printf '%s\n' "$@"; }; `+hint).Output()
	args := strings.Split(strings.TrimSuffix(string(out), "\n"), "\n")
	if err != nil || len(args) != 6 || args[0] != "-i" || args[2] != "-H" || args[4] != "-d" {
		t.Fatalf("%s: %q, %v", hint, args, err)
	}
	contentType, _ := strings.CutPrefix(args[3], "Content-Type: ")
	resp, err := http.Post(args[1], contentType, strings.NewReader(args[5]))
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusCreated {
		t.Errorf("%s: %s", hint, resp.Status)
	}
}

// A signal stops the program once the request in flight has been answered, or
// when SHUTDOWN_TIMEOUT has passed. A second one ends it.
func TestStop(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name    string
		timeout string
		then    func(p *process, held *heldRequest)
		code    int
		says    string // on the standard error
	}{
		{"finish", "1h", func(p *process, held *heldRequest) {
			if status, _ := p.get("/readyz"); status != http.StatusServiceUnavailable {
				p.t.Errorf("/readyz: %d", status)
			}
			if status := held.finish(); status != http.StatusCreated {
				p.t.Errorf("the request in flight: %d", status)
			}
		}, 0, "^$"},
		{"timeout", "200ms", func(*process, *heldRequest) {}, 1, "^tasks: requests were still in flight after 200ms"},
		{"second signal", "1h", func(p *process, _ *heldRequest) { p.signal(syscall.SIGTERM) }, -1, "^$"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			p := start(t, t.TempDir(), settings{"DATABASE_URL": newDatabase(t), "SHUTDOWN_TIMEOUT": test.timeout, "REQUEST_TIMEOUT": "45s"})
			held := p.hold()
			p.signal(syscall.SIGTERM)
			p.logged("msg=stopping")
			test.then(p, held)
			if said := p.exit(test.code); !regexp.MustCompile(test.says).MatchString(said) {
				t.Errorf("said %q, want %s", said, test.says)
			}
		})
	}
}

// localServer returns the process id of the private PostgreSQL in dir, 0 if
// there is none.
func localServer(dir string) (pid int) {
	text, _ := os.ReadFile(filepath.Join(dir, localDir, "data", "postmaster.pid"))
	line, _, _ := strings.Cut(string(text), "\n")
	pid, _ = strconv.Atoi(line)
	return pid
}

// From nothing to a server of its own, whose data outlast stops and crashes.
func TestPrivatePostgreSQL(t *testing.T) {
	t.Parallel()
	dir, err := os.MkdirTemp("", "tasks-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if localServer(dir) != 0 { // left by a failure
			if db, err := startLocalDB(context.Background(), filepath.Join(dir, localDir), os.Getenv("PG_BIN")); err == nil {
				db.Stop()
			}
		}
		os.RemoveAll(dir)
	})
	if err := os.Chmod(dir, 0o755); err != nil { // for the account that PostgreSQL runs as
		t.Fatal(err)
	}
	tasks := func(p *process) string {
		_, body := p.get("/api/tasks")
		return strings.Join(regexp.MustCompile("made [a-z ]*").FindAllString(body, -1), ", ")
	}

	// What libpq would take from the environment is about another server.
	p := start(t, dir, settings{"PGHOSTADDR": "192.0.2.1", "PGCHANNELBINDING": "require", "PGOPTIONS": "-c foo=bar"})
	p.post("made first")
	pid := localServer(dir)
	if runtime.GOOS == "linux" {
		if got := listening(t, pid); got != nil {
			t.Errorf("PostgreSQL listens on %s", got)
		}
		if got := listening(t, p.Process.Pid); !slices.Equal(got, []string{p.addr()}) {
			t.Errorf("the service listens on %s, want %s only", got, p.addr())
		}
	}
	if said := start(t, dir, nil).exit(1); !strings.Contains(said, fmt.Sprintf("process %d", p.Process.Pid)) {
		t.Errorf("a second instance said %q", said)
	}

	p.Process.Kill()
	p.exit(-1)
	p = start(t, dir, nil)
	if got, want := tasks(p), "made first"; got != want {
		t.Errorf("after a crash the tasks are %q, want %q", got, want)
	}
	if got := localServer(dir); got != pid {
		t.Errorf("after a crash the server is %d, want %d, which was running", got, pid)
	}
	p.post("made after a crash")
	p.signal(os.Interrupt)
	p.exit(0)
	if got := localServer(dir); got != 0 {
		t.Errorf("after a stop the server %d is running", got)
	}

	p = start(t, dir, nil)
	if got, want := tasks(p), "made first, made after a crash"; got != want {
		t.Errorf("after a restart the tasks are %q, want %q", got, want)
	}
	p.signal(syscall.SIGTERM)
	p.exit(0)
}

// listening returns the TCP addresses on which a process listens, on Linux.
func listening(t testing.TB, pid int) (addrs []string) {
	t.Helper()
	proc := fmt.Sprintf("/proc/%d", pid)
	fds, err := os.ReadDir(proc + "/fd")
	if err != nil {
		t.Fatal(err)
	}
	inodes := map[string]bool{}
	for _, fd := range fds {
		link, _ := os.Readlink(proc + "/fd/" + fd.Name())
		inodes[strings.Trim(link, "socket:[]")] = true
	}
	for _, table := range []string{"/net/tcp", "/net/tcp6"} {
		text, _ := os.ReadFile(proc + table)
		for line := range strings.Lines(string(text)) {
			const local, state, inode, listen = 1, 3, 9, "0A"
			fields := strings.Fields(line)
			if fields[state] != listen || !inodes[fields[inode]] {
				continue
			}
			var ip [4]byte
			var port int
			if _, err := fmt.Sscanf(fields[local], "%2x%2x%2x%2x:%4x", &ip[3], &ip[2], &ip[1], &ip[0], &port); err != nil {
				t.Fatal(err)
			}
			addrs = append(addrs, fmt.Sprintf("%s:%d", net.IP(ip[:]), port))
		}
	}
	return addrs
}

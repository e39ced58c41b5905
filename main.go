// Tasks keeps tasks in PostgreSQL and serves them as a REST API on /api/tasks.
//
// Usage:
//
//	tasks [-h] [-healthcheck]
//
// It is configured by environment variables; -h lists them. Without
// DATABASE_URL it runs a private PostgreSQL of its own, whose data it keeps in
// .postgres of the working directory. With -healthcheck it does not serve but
// asks a running service, found by the same variables, whether it is up.
//
// SIGINT and SIGTERM stop it: /readyz turns 503, the requests in flight finish,
// and it exits with 0, or with 1 when they did not within SHUTDOWN_TIMEOUT. A
// second signal ends it at once. Invalid settings exit with 2, any other
// failure to start with 1.
package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"regexp"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
)

// Limits that nobody has to set.
const (
	startTimeout      = time.Minute // for a database that may yet come
	retryInterval     = time.Second
	healthTimeout     = 2 * time.Second
	maxRequestTimeout = 45 * time.Second // leaves time to read the answer
	localDir          = ".postgres"
)

func main() {
	signal.Ignore(syscall.SIGPIPE) // a log without a reader does not end the service
	ctx, cancel := context.WithCancel(context.Background())
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	go func() {
		<-signals
		signal.Stop(signals) // so that a second one ends it at once
		cancel()
	}()
	err := run(ctx, os.Args[1:], os.Getenv, os.Stdout)
	if err == nil {
		return
	}
	stderr := newLogWriter(os.Stderr, nil)
	fmt.Fprintln(stderr, "tasks:", err)
	stderr.flush()
	if _, ok := errors.AsType[usageError](err); ok {
		os.Exit(2)
	}
	os.Exit(1)
}

// usageError is an error of the arguments or the environment.
type usageError struct{ error }

// run is the program. It serves until ctx ends.
func run(ctx context.Context, args []string, getenv func(string) string, stdout io.Writer) (err error) {
	flags := flag.NewFlagSet("tasks", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	healthcheck := flags.Bool("healthcheck", false, "")
	switch err := flags.Parse(args); {
	case errors.Is(err, flag.ErrHelp):
		_, err = io.WriteString(stdout, usage)
		return err
	case err != nil:
		return usageError{err}
	case flags.NArg() > 0:
		return usageError{fmt.Errorf("unexpected argument %q; settings are environment variables, see -h", flags.Arg(0))}
	}
	var cfg config
	log := newLogWriter(stdout, func(lines int64) {
		cfg.options.Logger.Warn("log lines were dropped, the log could not be written", "lines", lines)
	})
	defer log.flush()
	cfg, err = configure(getenv, log)
	if err != nil {
		return usageError{err}
	}
	if *healthcheck {
		return checkHealth(cfg.addr)
	}
	return serve(ctx, cfg)
}

// usage is what -h prints.
const usage = `Tasks keeps tasks in PostgreSQL and serves them on /api/tasks; /docs documents it.

Usage: tasks [-h] [-healthcheck]

  -h            print this help
  -healthcheck  ask a running service whether it is up, and exit with 0 or 1

Environment variables, an empty one counting as unset:

  DATABASE_URL      PostgreSQL to use, a URL or keywords and values as libpq takes
                    them; by default a private one, kept in .postgres
  ADDR              address to listen on (localhost:8080)
  PORT              port to listen on, on all interfaces, if ADDR is unset
  DB_MAX_CONNS      connections to PostgreSQL (10)
  DB_PREPARE        prepare statements: faster, but not behind a pooler in transaction
                    mode; true or false (false, but true for the private PostgreSQL)
  REQUEST_TIMEOUT   deadline of one request, at most 45s (5s)
  MAX_IN_FLIGHT     requests on tasks served at once; one more is 503 (1000)
  SHUTDOWN_TIMEOUT  how long a stop waits for the requests in flight (10s)
  CORS_ORIGINS      origins, separated by commas, whose pages may use the API, or * (none)
  LOG_LEVEL         debug, info, warn or error (info)
  LOG_FORMAT        text or json (text)
  PG_BIN            directory of the private PostgreSQL's programs (searched for)
`

// config is what the environment says.
type config struct {
	databaseURL     string // "": a private PostgreSQL
	prepare         bool
	pgBin           string
	addr            string
	maxConns        int
	shutdownTimeout time.Duration
	options         Options
	hints           io.Writer // where to tell a person what to do next; not nil
}

// configure reads the environment. Its errors name the variable.
func configure(getenv func(string) string, stdout io.Writer) (config, error) {
	env := environment{getenv: getenv}
	cfg := config{
		databaseURL:     getenv("DATABASE_URL"),
		prepare:         env.boolean("DB_PREPARE"),
		pgBin:           getenv("PG_BIN"),
		addr:            env.addr(),
		maxConns:        env.number("DB_MAX_CONNS", 10, 10_000),
		shutdownTimeout: env.duration("SHUTDOWN_TIMEOUT", 10*time.Second, time.Hour),
		options: Options{
			RequestTimeout: env.duration("REQUEST_TIMEOUT", 5*time.Second, maxRequestTimeout),
			MaxInFlight:    env.number("MAX_IN_FLIGHT", 1000, 1_000_000),
			CORSOrigins:    env.origins(),
			Logger:         slog.New(env.logHandler(stdout)),
		},
		hints: io.Discard,
	}
	if cmp.Or(getenv("LOG_FORMAT"), "text") == "text" {
		cfg.hints = stdout
	}
	return cfg, env.err
}

// environment reads variables and keeps the first error.
type environment struct {
	getenv func(string) string
	err    error
}

func (e *environment) invalid(name, want string) {
	if e.err == nil {
		e.err = fmt.Errorf("%s is %q; it must be %s", name, e.getenv(name), want)
	}
}

func (e *environment) number(name string, def, most int) int {
	n, err := strconv.Atoi(cmp.Or(e.getenv(name), strconv.Itoa(def)))
	if err != nil || n < 1 || n > most {
		e.invalid(name, fmt.Sprintf("a number from 1 to %d", most))
	}
	return n
}

func (e *environment) duration(name string, def, most time.Duration) time.Duration {
	d, err := time.ParseDuration(cmp.Or(e.getenv(name), def.String()))
	if err != nil || d <= 0 || d > most {
		e.invalid(name, fmt.Sprintf("a duration such as %v, at most %v", def, most))
	}
	return d
}

func (e *environment) boolean(name string) bool {
	b, err := strconv.ParseBool(cmp.Or(e.getenv(name), "false"))
	if err != nil {
		e.invalid(name, "true or false")
	}
	return b
}

func (e *environment) addr() string {
	name, want, addr := "ADDR", "host:port or :port", cmp.Or(e.getenv("ADDR"), "localhost:8080")
	if port := e.getenv("PORT"); e.getenv("ADDR") == "" && port != "" {
		name, want, addr = "PORT", "a port number", ":"+port
	}
	_, port, err := net.SplitHostPort(addr)
	if _, portErr := strconv.ParseUint(port, 10, 16); err != nil || portErr != nil {
		e.invalid(name, want)
	}
	return addr
}

func (e *environment) origins() []string {
	const name = "CORS_ORIGINS"
	var origins []string
	for origin := range strings.SplitSeq(e.getenv(name), ",") {
		origin = strings.TrimSpace(origin)
		switch {
		case origin == "":
			continue
		case origin != "*" && !isOrigin(origin):
			e.invalid(name, "* or a list of origins such as https://example.com, as browsers send them, separated by commas")
		}
		origins = append(origins, origin)
	}
	return origins
}

// isOrigin reports whether s is an origin as browsers send it (RFC 6454 §6.2):
// all in lower case, in ASCII, and without the scheme's own port.
func isOrigin(s string) bool {
	form := regexp.MustCompile(`^([a-z][a-z0-9+.-]*)://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:[1-9][0-9]{0,4})?$`)
	m := form.FindStringSubmatch(s)
	return m != nil && m[1]+m[3] != "http:80" && m[1]+m[3] != "https:443"
}

func (e *environment) logHandler(w io.Writer) slog.Handler {
	opts := &slog.HandlerOptions{}
	var level slog.Level
	if err := level.UnmarshalText([]byte(cmp.Or(e.getenv("LOG_LEVEL"), "info"))); err != nil {
		e.invalid("LOG_LEVEL", "debug, info, warn or error")
	}
	opts.Level = level
	switch e.getenv("LOG_FORMAT") {
	case "", "text":
		return slog.NewTextHandler(w, opts)
	case "json":
	default:
		e.invalid("LOG_FORMAT", "text or json")
	}
	return slog.NewJSONHandler(w, opts)
}

// checkHealth asks the service at addr whether it is up.
func checkHealth(addr string) error {
	client := http.Client{Timeout: healthTimeout, Transport: &http.Transport{}} // through no proxy
	resp, err := client.Get(serviceURL(addr) + "/healthz")
	if err != nil {
		return err
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s answered %s", resp.Request.URL, resp.Status)
	}
	return nil
}

// serviceURL returns the URL by which this machine reaches a listener at addr.
func serviceURL(addr string) string {
	host, port, _ := net.SplitHostPort(addr)
	if ip := net.ParseIP(host); host == "" || ip.IsUnspecified() {
		host = "localhost"
	}
	return "http://" + net.JoinHostPort(host, port)
}

// serve runs the service until ctx ends.
func serve(ctx context.Context, cfg config) (err error) {
	databaseURL, log := cfg.databaseURL, cfg.options.Logger
	if databaseURL == "" {
		unsetLibpq()
		log.Info("starting a private PostgreSQL", "directory", localDir)
		local, startErr := startLocalDB(ctx, localDir, cfg.pgBin, fmt.Sprintf("max_connections=%d", max(100, cfg.maxConns+10)))
		if startErr != nil {
			return unlessStopped(ctx, startErr)
		}
		defer func() { err = errors.Join(err, local.Stop()) }()
		databaseURL, cfg.prepare = local.URL, true
	}
	db, err := openDB(databaseURL, cfg.prepare)
	if err != nil {
		return usageError{fmt.Errorf("DATABASE_URL: %w", err)}
	}
	defer db.Close()
	db.SetMaxOpenConns(cfg.maxConns)
	db.SetMaxIdleConns(cfg.maxConns)
	store := NewStore(db)
	if err := migrate(ctx, store, log); err != nil {
		return unlessStopped(ctx, err)
	}
	listener, err := net.Listen("tcp", cfg.addr)
	if err != nil {
		return fmt.Errorf("%w (ADDR or PORT chooses another address)", err)
	}
	handler := NewHandler(store, cfg.options)
	server := NewServer(handler, handler)
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	_, port, _ := net.SplitHostPort(listener.Addr().String()) // ADDR's may be 0
	host, _, _ := net.SplitHostPort(cfg.addr)
	where := serviceURL(net.JoinHostPort(host, port))
	log.Info("serving", "url", where+"/api/tasks", "docs", where+"/docs")
	fmt.Fprintf(cfg.hints, "Try: curl -i %s/api/tasks -H 'Content-Type: application/json' -d '{\"title\": \"Buy milk\"}'\n", where)
	select {
	case err := <-served:
		return err
	case <-ctx.Done():
	}
	log.Info("stopping")
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cfg.shutdownTimeout)
	defer cancel()
	if err := server.Shutdown(ctx); err != nil {
		return fmt.Errorf("requests were still in flight after %v: %w", cfg.shutdownTimeout, err)
	}
	return nil
}

// unsetLibpq unsets the environment variables of libpq: they are about another
// server than the private one.
func unsetLibpq() {
	for _, variable := range os.Environ() {
		if name, _, _ := strings.Cut(variable, "="); strings.HasPrefix(name, "PG") {
			os.Unsetenv(name)
		}
	}
}

// unlessStopped returns the error of a start, or nil if it was told to stop.
func unlessStopped(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// migrate applies the schema, waiting for a database that may yet come.
func migrate(ctx context.Context, store *Store, log *slog.Logger) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	for {
		err := store.Migrate(ctx)
		if err == nil || !transient(err) {
			return err
		}
		log.Warn("the database is not ready yet", "error", err)
		select {
		case <-ctx.Done():
			return fmt.Errorf("the database was not ready within %v: %w", startTimeout, err)
		case <-time.After(retryInterval):
		}
	}
}

// logWriter writes lines in the background, so that a reader of the log that
// does not read holds up neither requests nor a stop.
type logWriter struct {
	lines   chan []byte
	dropped atomic.Int64  // lines that found too many others waiting
	flushed chan struct{} // closed once all lines before an empty one are written
}

// newLogWriter returns a logWriter for w. When w takes lines again after some
// were dropped, report is called with their number.
func newLogWriter(w io.Writer, report func(lines int64)) *logWriter {
	l := &logWriter{lines: make(chan []byte, 10_000), flushed: make(chan struct{})}
	go func() {
		defer close(l.flushed)
		for line := range l.lines {
			if len(line) == 0 {
				return
			}
			w.Write(line) // there is no place to report an error
			if len(l.lines) == 0 && l.dropped.Load() > 0 {
				report(l.dropped.Swap(0))
			}
		}
	}()
	return l
}

// Write takes a line. It does not wait and does not fail.
func (l *logWriter) Write(line []byte) (int, error) {
	select {
	case l.lines <- bytes.Clone(line):
	default:
		l.dropped.Add(1)
	}
	return len(line), nil
}

// flush waits until the lines so far are written, for a second at most. Lines
// that come later are not written.
func (l *logWriter) flush() {
	go func() { l.lines <- nil }()
	select {
	case <-l.flushed:
	case <-time.After(time.Second):
	}
}

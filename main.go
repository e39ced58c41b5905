// Usage:
//
//	tasks [-h] [-healthcheck]
//
// The program is configured by environment variables; -h lists them. Without
// DATABASE_URL it runs a private PostgreSQL, whose data it keeps in .postgres of
// the working directory. With -healthcheck it asks a running service, which it
// finds by the same variables, whether it is up.
//
// On SIGINT, SIGTERM or, unless it is ignored, SIGHUP, /readyz turns 503, the
// requests in flight finish, and the program exits with 0, or with 1 if they did
// not finish within SHUTDOWN_TIMEOUT. A second SIGINT or SIGTERM ends it at once.
// Invalid settings exit with 2, any other failure to start with 1.
package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"regexp"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

const (
	startTimeout      = time.Minute                  // for a database that is still starting
	maxRequestTimeout = writeTimeout - 5*time.Second // leaves time to send the response
	localDir          = ".postgres"
)

func main() {
	signal.Ignore(syscall.SIGPIPE) // a log without a reader does not end the service
	signals := []os.Signal{os.Interrupt, syscall.SIGTERM}
	if !signal.Ignored(syscall.SIGHUP) { // as nohup does
		signals = append(signals, syscall.SIGHUP) // the terminal is closed
	}
	ctx, stop := signal.NotifyContext(context.Background(), signals...)
	// A second signal ends the program at once, but a terminal sends SIGHUP twice.
	context.AfterFunc(ctx, func() { signal.Ignore(syscall.SIGHUP); stop() })
	if os.Getenv("GOGC") == "" && os.Getenv("GOMEMLIMIT") == "" {
		debug.SetGCPercent(250) // collects less often than Go's 100, for more memory under load
	}
	err := run(ctx, os.Args[1:], os.Getenv, os.Stdout)
	if err == nil {
		return
	}
	stderr, flush := newLogWriter(os.Stderr) // which may be blocked
	fmt.Fprintln(stderr, "tasks:", err)
	flush()
	code := 1
	if _, ok := errors.AsType[usageError](err); ok {
		code = 2
	}
	os.Exit(code)
}

// usageError is an error of the arguments or the environment.
type usageError struct{ error }

// run is the program. It serves until ctx ends.
func run(ctx context.Context, args []string, getenv func(string) string, stdout io.Writer) error {
	flags := flag.NewFlagSet("tasks", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	healthcheck := flags.Bool("healthcheck", false, "")
	switch err := flags.Parse(args); {
	case errors.Is(err, flag.ErrHelp):
		_, err = io.WriteString(stdout, usage())
		return err
	case err != nil:
		return usageError{err}
	case flags.NArg() > 0:
		return usageError{fmt.Errorf("unexpected argument %q; settings are environment variables, see -h", flags.Arg(0))}
	}
	log, flush := newLogWriter(stdout)
	defer flush()
	cfg, err := configure(getenv, log)
	if err != nil {
		return usageError{err}
	}
	if *healthcheck {
		return checkHealth(cfg.addr)
	}
	return serve(ctx, cfg)
}

// config is what the environment says.
type config struct {
	databaseURL                     string // "": a private PostgreSQL
	prepare, pgBin, addr            string
	userHeader, logLevel, logFormat string
	maxConns                        int
	shutdownTimeout, shutdownDelay  time.Duration
	options                         Options
	hints                           io.Writer // for hints to a person; not nil
}

// variable is an environment variable.
type variable struct {
	name, byDefault, help string
	parser
}

// parser reads the value of a variable.
type parser struct {
	want string                      // what the value may be, in words
	set  func(text string) (ok bool) // sets a field
}

// variables returns the variables of the program. Each sets a field of c. ADDR
// comes after PORT because it overrides it.
func variables(c *config) []variable {
	return []variable{
		{"DATABASE_URL", "", "PostgreSQL to use: a URL, or keywords and values, as libpq reads them; unset: a private one, kept in " + localDir,
			matching(&c.databaseURL, "", "")},
		{"PORT", "", "port to listen on, on all interfaces; ADDR overrides it",
			parser{"a port number", func(port string) bool { c.addr = ":" + port; return isAddr(c.addr) }}},
		{"ADDR", "localhost:8080", "address to listen on",
			parser{"host:port or :port", func(addr string) bool { c.addr = addr; return isAddr(addr) }}},
		{"DB_MAX_CONNS", "10", "connections to PostgreSQL", number(&c.maxConns, 10_000)},
		{"DB_PREPARE", "auto", "prepare statements: auto (on direct connections), true or false; true behind a transaction-mode pooler destroys data",
			matching(&c.prepare, "auto, true or false", "auto|true|false")},
		{"REQUEST_TIMEOUT", "5s", "deadline of one request, at most 45s", duration(&c.options.RequestTimeout, 1, maxRequestTimeout)},
		{"MAX_IN_FLIGHT", "1000", "API requests served at once; any more get a 503", number(&c.options.MaxInFlight, 1_000_000)},
		{"SHUTDOWN_DELAY", "0s", "on a stop, how long to go on accepting requests while /readyz is 503", duration(&c.shutdownDelay, 0, time.Hour)},
		{"SHUTDOWN_TIMEOUT", "10s", "how long to wait for requests in flight after that", duration(&c.shutdownTimeout, 1, time.Hour)},
		{"USER_HEADER", "", "header in which an authenticating proxy passes the user, such as X-Forwarded-User",
			matching(&c.userHeader, "the name of a header", "[A-Za-z0-9!#$%&'*+.^_`|~-]+")},
		{"ALLOWED_HOSTS", "", "names that requests may have as Host, separated by commas, or *; unset: localhost on a loopback address, any on others",
			list(&c.options.Hosts, "host names without port", isHost)},
		{"PATH_PREFIX", "", "path below which clients see the service and which a proxy removes, such as /todo",
			matching(&c.options.Prefix, "a path such as /todo, without a slash at its end", "(/([A-Za-z0-9._~!$&'()*+,;=:@-]|%[0-9A-Fa-f]{2})+)+")},
		{"CORS_ORIGINS", "", "origins whose pages may use the API, separated by commas, or *",
			list(&c.options.CORSOrigins, "origins such as https://example.com, as browsers send them", isOrigin)},
		{"LOG_LEVEL", "info", "debug, info, warn or error", matching(&c.logLevel, "debug, info, warn or error", "(?i)debug|info|warn|error")},
		{"LOG_FORMAT", "text", "text or json", matching(&c.logFormat, "text or json", "text|json")},
		{"PG_BIN", "", "directory of the private PostgreSQL's programs; unset: searched for",
			parser{"a directory with PostgreSQL's programs", func(dir string) bool { c.pgBin = dir; _, err := os.Stat(dir + "/postgres"); return err == nil }}},
	}
}

// usage returns what -h prints.
func usage() string {
	var b strings.Builder
	b.WriteString("Tasks keeps tasks in PostgreSQL and serves them on /api/tasks; /docs documents it.\n\n" +
		"Usage: tasks [-h] [-healthcheck]\n\n" +
		"  -h            print this help\n" +
		"  -healthcheck  ask a running service whether it is up, and exit with 0 or 1\n\n" +
		"Environment variables; an empty one counts as unset:\n\n")
	for _, s := range variables(new(config)) {
		b.WriteString(strings.TrimSuffix(fmt.Sprintf("  %-16s  %s (%s)", s.name, s.help, s.byDefault), " ()") + "\n")
	}
	return b.String()
}

// configure reads the environment.
func configure(getenv func(string) string, out io.Writer) (cfg config, err error) {
	all := variables(&cfg)
	for _, s := range all {
		s.set(s.byDefault)
	}
	for _, s := range all {
		if text := getenv(s.name); text != "" && !s.set(strings.TrimSpace(text)) {
			return cfg, fmt.Errorf("%s is %q; it must be %s", s.name, text, s.want)
		}
	}
	if cfg.userHeader != "" {
		cfg.options.Authenticate = userHeader(cfg.userHeader)
	}
	var level slog.Level
	_ = level.UnmarshalText([]byte(cfg.logLevel)) // cannot fail
	opts := &slog.HandlerOptions{Level: level}
	cfg.options.Logger, cfg.hints = slog.New(slog.NewTextHandler(out, opts)), out
	if cfg.logFormat == "json" {
		cfg.options.Logger, cfg.hints = slog.New(slog.NewJSONHandler(out, opts)), io.Discard
	}
	return cfg, nil
}

// matching reads what matches a regular expression; "" matches anything.
func matching(field *string, want, expression string) parser {
	return parser{want, func(text string) bool {
		*field = text
		return expression == "" || matches(text, expression)
	}}
}

func number(field *int, most int) parser {
	return parser{fmt.Sprintf("a number from 1 to %d", most), func(text string) (ok bool) {
		n, err := strconv.Atoi(text)
		*field = n
		return err == nil && 1 <= n && n <= most
	}}
}

func duration(field *time.Duration, least, most time.Duration) parser {
	return parser{fmt.Sprintf("a duration such as 5s, at most %v", most), func(text string) bool {
		d, err := time.ParseDuration(text)
		*field = d
		return err == nil && least <= d && d <= most
	}}
}

// list reads values that are separated by commas or spaces.
func list(field *[]string, want string, valid func(string) bool) parser {
	return parser{"* or " + want + ", separated by commas", func(text string) bool {
		*field = strings.FieldsFunc(text, func(r rune) bool { return r == ',' || r == ' ' })
		return len(*field) > 0 && !slices.ContainsFunc(*field, func(v string) bool { return v != "*" && !valid(v) })
	}}
}

// matches reports whether a regular expression matches the whole of s.
func matches(s, expression string) bool {
	return regexp.MustCompile("^(?:" + expression + ")$").MatchString(s)
}

func isAddr(s string) bool {
	_, port, err := net.SplitHostPort(s)
	_, portErr := strconv.ParseUint(port, 10, 16)
	return err == nil && portErr == nil
}

func isHost(s string) bool {
	return matches(s, `[A-Za-z0-9._-]+`) || net.ParseIP(strings.Trim(s, "[]")) != nil
}

// isOrigin reports whether s is an origin as browsers send it (RFC 6454 §6.2):
// in lower case and ASCII, without the scheme's own port.
func isOrigin(s string) bool {
	return matches(s, `[a-z][a-z0-9+.-]*://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:[1-9][0-9]{0,4})?`) && !matches(s, `http:.*:80|https:.*:443`)
}

// userHeader authenticates requests by a header that a proxy sets.
func userHeader(name string) func(*http.Request) (string, error) {
	return func(r *http.Request) (string, error) {
		users := r.Header.Values(name)
		if len(users) != 1 || users[0] == "" {
			return "", fmt.Errorf("%d values of %s", len(users), name)
		}
		return users[0], nil
	}
}

// checkHealth asks the service at addr whether it is up.
func checkHealth(addr string) error {
	req := &http.Request{URL: &url.URL{Scheme: "http", Host: reachable(addr), Path: "/healthz"}, Host: "localhost"} // which is always served
	client := http.Client{Timeout: 2 * time.Second, Transport: &http.Transport{}}                                   // through no proxy
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s answered %s", resp.Request.URL, resp.Status)
	}
	return nil
}

// reachable returns the address by which this machine reaches a listener at addr.
func reachable(addr string) string {
	host, port, _ := net.SplitHostPort(addr)
	if ip := net.ParseIP(host); host == "" || ip.IsUnspecified() {
		host = "localhost"
	}
	return net.JoinHostPort(host, port)
}

// serve runs the service until ctx ends.
func serve(ctx context.Context, cfg config) (err error) {
	log := cfg.options.Logger
	if cfg.databaseURL == "" {
		for _, pair := range os.Environ() { // libpq's variables are about another server
			if name, _, _ := strings.Cut(pair, "="); strings.HasPrefix(name, "PG") {
				os.Unsetenv(name)
			}
		}
		log.Info("starting a private PostgreSQL", "directory", localDir)
		local, startErr := startLocalDB(ctx, localDir, cfg.pgBin, fmt.Sprintf("max_connections=%d", max(100, cfg.maxConns+10)))
		if startErr != nil {
			return unlessStopped(ctx, startErr)
		}
		defer func() { err = errors.Join(err, local.Stop()) }()
		cfg.databaseURL = local.URL
		if cfg.prepare == "auto" {
			cfg.prepare = "true" // its connections are direct
		}
	}
	db, err := openDB(cfg.databaseURL, cfg.prepare)
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
	addr := listener.Addr().(*net.TCPAddr)
	if addr.IP.IsLoopback() && len(cfg.options.Hosts) == 0 {
		cfg.options.Hosts = []string{"localhost"} // against DNS rebinding
	}
	handler := NewHandler(store, cfg.options)
	server := NewServer(handler, handler)
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	host, _, _ := net.SplitHostPort(cfg.addr)
	where := "http://" + reachable(net.JoinHostPort(host, strconv.Itoa(addr.Port))) + cfg.options.Prefix
	log.Info("serving", "url", where+"/api/tasks", "docs", where+"/docs")
	fmt.Fprintf(cfg.hints, "Try: curl -i %s/api/tasks -H 'Content-Type: application/json' -d '{\"title\": \"Buy milk\"}'\n", where)
	select {
	case err := <-served:
		return err
	case <-ctx.Done():
	}
	log.Info("stopping")
	handler.Drain()
	time.Sleep(cfg.shutdownDelay)
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cfg.shutdownTimeout)
	defer cancel()
	if err := server.Shutdown(ctx); err != nil {
		return fmt.Errorf("requests were still in flight after %v: %w", cfg.shutdownTimeout, err)
	}
	return nil
}

// unlessStopped returns the error of a start, or nil if ctx has ended it.
func unlessStopped(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// migrate applies the schema, waiting for a database that is still starting.
func migrate(ctx context.Context, store *Store, log *slog.Logger) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	for {
		err := store.Migrate(ctx)
		if err == nil || !errors.Is(err, ErrUnavailable) {
			return err
		}
		log.Warn("the database is not ready yet", "error", err)
		select {
		case <-ctx.Done():
			return fmt.Errorf("the database was not ready within %v: %w", startTimeout, err)
		case <-time.After(time.Second):
		}
	}
}

// logWriter writes lines in the background, so that a blocked log delays neither
// requests nor a stop. While 10,000 lines are waiting, further ones are lost.
type logWriter chan []byte

// newLogWriter also returns flush, which waits until the lines so far are
// written, for a second at most.
func newLogWriter(w io.Writer) (l logWriter, flush func()) {
	l, done := make(logWriter, 10_000), make(chan struct{})
	go func() {
		defer close(done)
		for line := <-l; line != nil; line = <-l {
			w.Write(line) // there is no place to report an error
		}
	}()
	return l, func() {
		go func() { l <- nil }()
		select {
		case <-done:
		case <-time.After(time.Second):
		}
	}
}

// Write takes a line. It does not wait and does not fail.
func (l logWriter) Write(line []byte) (int, error) {
	select {
	case l <- bytes.Clone(line):
	default:
	}
	return len(line), nil
}

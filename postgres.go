package main

// postgres.go connects to PostgreSQL: it reads the connection string, opens the
// pool, and adds to lib/pq's connections what a service needs. No statement runs
// twice, or outlives its context on a silent server, and statements are prepared
// where that is safe. It knows nothing about tasks.

import (
	"cmp"
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/netip"
	neturl "net/url"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/lib/pq"
)

// OpenDB returns a pool of connections to the PostgreSQL that url names. url is
// a URL or a string of keywords and values, as libpq reads them (PostgreSQL's
// manual, §34.1.1), with these differences:
//
//   - sslmode defaults to disable for a Unix socket or a loopback host, and to
//     require for any other host;
//   - channel_binding=require, which lib/pq does not know, becomes
//     sslmode=verify-full, which protects against the same attacks, with the
//     system's certificates unless sslrootcert names others;
//   - a name that libpq does not know is a setting of the server;
//   - in a URL an @ outside user and password must be percent-encoded, as must
//     every #.
//
// OpenDB does not connect. Its errors never contain a password. The pool has up to
// 10 connections, and closes those that are idle for two minutes, so that a
// serverless database can sleep.
//
// The pool never repeats a statement, not even one of [sql.DB.Prepare]: if the
// connection is lost, the outcome is unknown, which is an error.
//
// A connection prepares a query with parameters when it first runs it, if the
// connection is direct: over TCP, with no pooler, proxy or NAT in between. One
// plan then serves all values of the parameters, and avoids sorting.
func OpenDB(url string) (*sql.DB, error) { return openDB(url, prepareAuto) }

// prepareMode says which connections prepare. Behind a pooler that lends a server
// connection for one transaction, a client's prepared statement may be another's.
type prepareMode int

const (
	prepareAuto   prepareMode = iota // those that are direct
	prepareAlways                    // all
	prepareNever
)

func openDB(url string, prepare prepareMode) (*sql.DB, error) {
	cfg, err := parseURL(url)
	if err != nil {
		return nil, err
	}
	db := sql.OpenDB(&connector{cfg: cfg, prepare: prepare})
	db.SetMaxOpenConns(10)
	db.SetMaxIdleConns(10)
	db.SetConnMaxIdleTime(2 * time.Minute)
	return db, nil
}

// parseURL reads a connection string as OpenDB's documentation says.
func parseURL(url string) (cfg pq.Config, err error) {
	set, err := parseSettings(strings.TrimSpace(url))
	if err == nil {
		err = addService(set)
	}
	if err != nil {
		return cfg, err
	}
	binding := cmp.Or(set["channel_binding"], "prefer")
	delete(set, "channel_binding")
	keywords := ""
	for name, value := range set {
		keywords += name + "='" + strings.NewReplacer(`\`, `\\`, `'`, `\'`).Replace(value) + "' "
	}
	cfg, err = pq.NewConfig(keywords)
	switch {
	case err != nil && (errors.Is(err, pq.ErrCouldNotDetectUsername) || !strings.HasPrefix(err.Error(), "pq: ")):
		return cfg, fmt.Errorf("no user given, and the process has none with a name (%w)", err)
	case err != nil:
		return cfg, err
	case isSocket(cfg.Host) && !allLocal(cfg): // for which lib/pq gives up TLS
		return cfg, errors.New("a Unix socket must not come before a host that is not of this machine")
	case binding == "prefer" || binding == "disable":
	case binding != "require":
		return cfg, fmt.Errorf("channel_binding is %q; it must be disable, prefer or require", binding)
	case cfg.SSLMode == pq.SSLModeDisable:
		return cfg, errors.New("channel_binding=require needs TLS, but sslmode=disable and Unix sockets do without")
	default:
		cfg.SSLMode = pq.SSLModeVerifyFull
		cfg.SSLRootCert = cmp.Or(cfg.SSLRootCert, "system")
	}
	cfg.Host = cmp.Or(cfg.Host, "localhost")
	cfg.BinaryParameters = true // a statement is sent with its parameters, so that no pooler comes between
	if cfg.SSLMode == "" {
		cfg.SSLMode = pq.SSLModeRequire
		if allLocal(cfg) {
			cfg.SSLMode = pq.SSLModeDisable
		}
	}
	return cfg, nil
}

// Forms of connection strings, and what is pasted along with them.
var (
	pastedForm = regexp.MustCompile("^(?:postgres(?:ql)?(\\+\\w+)://|(psql\\b|export\\b|[A-Z_]*(?:URL|URI|DSN)=|[\"'`]))")
	urlForm    = regexp.MustCompile(`^postgres(?:ql)?://(?:([^:/?#\s]*)(?::([^/?#\s]*))?@)?([^@/?#\s]*)` + // user, password, hosts
		`(?:/([^@?#\s]*))?(?:\?([\w.]+=[^@#;&\s]*(?:&[\w.]+=[^@#;&\s]*)*)?)?$`) // database, query
	hostForm   = regexp.MustCompile(`^(?:\[(.*)\]|([^:]*))(?::(\d{0,5}))?$`)
	pairForm   = regexp.MustCompile(`(?s)^([\w.]+)\s*=\s*(?:'((?:[^'\\]|\\.)*)'|((?:[^\s'\\]|\\.)(?:[^\s\\]|\\.)*)?)(?:\s+|$)`)
	escapeForm = regexp.MustCompile(`(?s)\\(.)`)
	lineForm   = regexp.MustCompile(`(?m)^\s*([\w.]+)\s*=\s*(.*?)\s*$`)
)

// errSyntax does not show what is wrong: any part could be of the password.
var errSyntax = errors.New("neither a URL such as postgres://user:password@host:port/database?name=value, with special characters " +
	"percent-encoded (@ is %40, # %23, / %2F, ? %3F, % %25), nor keywords and values such as host=localhost password='with spaces'")

// parseSettings returns the settings of a connection string by libpq's names.
func parseSettings(s string) (map[string]string, error) {
	if m := pastedForm.FindStringSubmatch(s); m != nil {
		return nil, fmt.Errorf("remove %s from the connection string", m[1]+m[2])
	}
	set := map[string]string{}
	if m := urlForm.FindStringSubmatch(s); m != nil {
		var hosts, ports []string
		for host := range strings.SplitSeq(m[3], ",") {
			h := hostForm.FindStringSubmatch(host)
			if h == nil {
				return nil, errSyntax
			}
			hosts, ports = append(hosts, h[1]+h[2]), append(ports, h[3])
		}
		pairs := append(strings.Split(m[5], "&"), "user="+m[1], "password="+m[2], "host="+strings.Join(hosts, ","), "dbname="+m[4])
		if strings.Join(ports, "") != "" {
			ports[0] = cmp.Or(ports[0], "5432") // lib/pq has this default for the others
			pairs = append(pairs, "port="+strings.Join(ports, ","))
		}
		for _, pair := range pairs {
			name, value, _ := strings.Cut(pair, "=")
			value, err := neturl.PathUnescape(value)
			if err != nil || strings.Contains(value, "\x00") {
				return nil, errSyntax
			}
			if value != "" {
				set[name] = value
			}
		}
		return set, nil
	}
	for s != "" {
		m := pairForm.FindStringSubmatch(s)
		if m == nil {
			return nil, errSyntax
		}
		set[m[1]] = escapeForm.ReplaceAllString(m[2]+m[3], "$1")
		s = s[len(m[0]):]
	}
	return set, nil
}

// addService adds the settings of a service file that the connection string does
// not have itself. lib/pq would let the file win (lib/pq#1344).
func addService(set map[string]string) error {
	service, host := cmp.Or(set["service"], os.Getenv("PGSERVICE")), set["host"]
	set["service"] = ""
	if service == "" {
		return nil
	}
	home, _ := os.UserHomeDir()
	file := cmp.Or(os.Getenv("PGSERVICEFILE"), filepath.Join(home, ".pg_service.conf"))
	text, err := os.ReadFile(file)
	section := regexp.MustCompile(`(?ms)^\s*\[\s*` + regexp.QuoteMeta(service) + `\s*\](.*?)(?:^\s*\[|\z)`).FindSubmatch(text)
	if section == nil {
		return fmt.Errorf("service %q is not in %s (%v)", service, file, err)
	}
	for _, m := range lineForm.FindAllStringSubmatch(string(section[1]), -1) {
		if _, given := set[m[1]]; !given && !(m[1] == "hostaddr" && host != "") {
			set[m[1]] = m[2]
		}
	}
	return nil
}

// isSocket reports whether a host is a Unix socket.
func isSocket(host string) bool { return filepath.IsAbs(host) || strings.HasPrefix(host, "@") }

// allLocal reports whether all hosts are Unix sockets or loopback hosts, judged
// as they are given.
func allLocal(cfg pq.Config) bool {
	hosts := append([]pq.ConfigMultihost{{Host: cfg.Host, Hostaddr: cfg.Hostaddr}}, cfg.Multi...)
	return !slices.ContainsFunc(hosts, func(h pq.ConfigMultihost) bool {
		if addr, err := netip.ParseAddr(h.Host); err == nil && !h.Hostaddr.IsValid() {
			h.Hostaddr = addr
		}
		named := h.Host == "localhost" || isSocket(h.Host)
		return !h.Hostaddr.Unmap().IsLoopback() && (h.Hostaddr.IsValid() || !named)
	})
}

// sqlState returns the SQLSTATE of an error that the server reported, by any
// driver, else "".
func sqlState(err error) string {
	if err, ok := errors.AsType[interface {
		error
		SQLState() string
	}](err); ok {
		return err.SQLState()
	}
	return ""
}

// misconfigured matches what PgBouncer says of wrong settings and passwords. It
// gives all its errors the SQLSTATE 08P01; the others may pass.
var misconfigured = regexp.MustCompile(`startup parameter|authentication failed|no such (user|database)|rejected| required`)

// passing matches what lib/pq says of a standby or of a server that cannot fork.
var passing = regexp.MustCompile(`hot standby mode|session is |pq: server error: `)

// transient reports whether an error may pass without a change of the statement,
// the settings or the schema: the server is out of reach, starting or stopping,
// at its limits, too slow, or a standby for the moment.
func transient(err error) bool {
	_, connecting := errors.AsType[*connectError](err)
	if state := sqlState(err); len(state) == 5 {
		// Connection exception; invalid transaction state, such as read-only;
		// transaction rollback; insufficient resources; operator intervention, such
		// as a shutdown or a timeout; system error. And lock_not_available; and
		// internal_error, as proxies report a server that is not there yet.
		return slices.Contains([]string{"08", "25", "40", "53", "57", "58"}, state[:2]) && !misconfigured.MatchString(err.Error()) ||
			state == "55P03" || state == "XX000" && connecting
	}
	// A missing file and an alert of TLS look like a broken connection.
	_, noFile := errors.AsType[*fs.PathError](err)
	if op, ok := errors.AsType[*net.OpError](err); connecting && (noFile || ok && op.Op == "remote error") {
		return false
	}
	_, lost := errors.AsType[net.Error](err)
	return lost || connecting && passing.MatchString(err.Error()) || errors.Is(err, errUnknownOutcome) ||
		errors.Is(err, driver.ErrBadConn) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)
}

// errUnknownOutcome is the error of a statement that may or may not have been
// executed, or may still be.
var errUnknownOutcome = errors.New("connection lost; the outcome of the statement is unknown")

// connectError is the error of an attempt to connect.
type connectError struct{ err error }

func (e *connectError) Error() string { return "connect to PostgreSQL: " + e.err.Error() }
func (e *connectError) Unwrap() error { return e.err }

// connector makes conns.
type connector struct {
	cfg     pq.Config
	prepare prepareMode
	moves   atomic.Int64 // how often a connection found its server read-only
}

// Driver is for [sql.DB.Driver].
func (c *connector) Driver() driver.Driver { return pq.Driver{} }

func (c *connector) Connect(ctx context.Context) (driver.Conn, error) {
	cn := &conn{connector: c, moves: c.moves.Load(), wire: &wire{timeout: cmp.Or(c.cfg.ConnectTimeout, connectTimeout)}}
	if deadline, ok := ctx.Deadline(); ok {
		cn.wire.timeout = min(cn.wire.timeout, time.Until(deadline))
	}
	cn.wire.timeout /= time.Duration(1 + len(c.cfg.Multi)) // a silent host leaves time for the others
	cfg := c.cfg
	cfg.ConnectTimeout = 0 // would make lib/pq remove the wire's deadline too early
	lib, err := pq.NewConnectorConfig(cfg)
	if err != nil {
		return nil, err
	}
	lib.Dialer(cn.wire)
	dc, err := lib.Connect(ctx)
	if errors.Is(err, pq.ErrSSLNotSupported) {
		err = fmt.Errorf("%w (sslmode=disable connects without TLS)", err)
	}
	if err != nil {
		return nil, &connectError{err}
	}
	cn.pqConn, cn.wire.connected = dc.(pqConn), true
	err = cn.setUp(ctx)
	if !cn.wire.stop() {
		err = cmp.Or(err, ctx.Err())
	}
	if err != nil {
		cn.Close()
		return nil, &connectError{err}
	}
	cn.wire.socket.SetDeadline(time.Time{})
	return cn, nil
}

// Limits of what a server may take its time for.
const (
	connectTimeout = 10 * time.Second       // to accept a connection, unless connect_timeout is set
	cancelTimeout  = 400 * time.Millisecond // to accept the request to cancel a statement
	cancelGrace    = 50 * time.Millisecond  // to answer, after a statement's context has ended
	closeTimeout   = 100 * time.Millisecond // to take the end of a connection
)

// aliveTime is how long after its last statement a connection is taken to be
// alive without a look, which would cost a system call.
const aliveTime = time.Millisecond

// wire dials the network connection of a conn. When a statement's context ends,
// lib/pq dials once more, to ask the server to cancel the statement. But a silent
// server does not answer, and PostgreSQL ignores a request that arrives before the
// statement has begun. So the connection then gets a deadline, and no other
// statement, which the request could meet.
type wire struct {
	net.Dialer
	timeout   time.Duration // for each host
	socket    net.Conn
	connected bool
	stop      func() bool // makes socket independent of the context of Connect
	unfit     atomic.Bool // for another statement
}

func (w *wire) expire() {
	w.unfit.Store(true)
	w.socket.SetDeadline(time.Now().Add(cancelGrace))
}

func (w *wire) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	timeout := w.timeout
	if w.connected {
		w.expire()
		timeout = cancelTimeout
	}
	deadline := time.Now().Add(timeout)
	dialCtx, cancel := context.WithDeadline(ctx, deadline)
	defer cancel()
	socket, err := w.Dialer.DialContext(dialCtx, network, address)
	if err != nil {
		return nil, err
	}
	socket.SetDeadline(deadline)
	if !w.connected {
		if w.socket != nil { // to a host that was tried before; lib/pq may leave it open
			w.socket.Close()
		}
		w.socket, w.stop = socket, context.AfterFunc(ctx, func() { socket.SetDeadline(time.Now()) })
	}
	return socket, nil
}

// DialTimeout is of no use here, but lib/pq's interface has it.
func (w *wire) DialTimeout(network, address string, timeout time.Duration) (net.Conn, error) {
	return net.DialTimeout(network, address, timeout)
}

// closed reports whether the server has closed the connection, or has sent what
// nobody asked for, such as the reason why it is about to.
func (w *wire) closed() bool {
	raw, err := w.socket.(syscall.Conn).SyscallConn()
	if err != nil {
		return true
	}
	quiet := false
	err = raw.Read(func(fd uintptr) bool { quiet = wouldBlock(syscall.Read, fd); return true })
	return err != nil || !quiet
}

// wouldBlock reports whether a file descriptor in non-blocking mode has nothing
// to read. read is [syscall.Read], whose first parameter has another type on
// each system.
func wouldBlock[FD ~int | ~uintptr](read func(FD, []byte) (int, error), fd uintptr) bool {
	var b [1]byte
	_, err := read(FD(fd), b[:])
	return err == syscall.EAGAIN
}

// pqConn is what lib/pq's connections can do.
type pqConn interface {
	driver.Conn
	driver.ConnBeginTx
	driver.ConnPrepareContext
	driver.ExecerContext
	driver.NamedValueChecker
	driver.Pinger
	driver.QueryerContext
	driver.Validator
}

// conn is a connection of lib/pq.
type conn struct {
	pqConn
	connector *connector
	wire      *wire
	moves     int64                              // the connector's, when this connection was begun
	used      time.Time                          // when the last statement was answered
	prepared  map[string]driver.StmtQueryContext // by query; nil: none are
}

// setUp makes a connection prepare its queries, if that is asked for or safe. Only
// then, hence in one statement, PostgreSQL changes settings of the session: behind
// a pooler other clients would get them.
func (c *conn) setUp(ctx context.Context) error {
	// One plan serves all values, which PostgreSQL does not expect. Nor does it
	// know then how short a page is: without these settings it might read and sort
	// what an index has in order, or compile it.
	query := "SELECT set_config(name, value, false) FROM (VALUES " +
		"('plan_cache_mode', 'force_generic_plan'), ('enable_sort', 'off'), ('jit', 'off')) AS settings (name, value)"
	local, tcp := c.wire.socket.LocalAddr().(*net.TCPAddr)
	if c.connector.prepare == prepareNever || c.connector.prepare == prepareAuto && !tcp {
		return nil
	}
	if c.connector.prepare == prepareAuto {
		// With a pooler, proxy or NAT in between PostgreSQL has other addresses or ports.
		remote := c.wire.socket.RemoteAddr().(*net.TCPAddr)
		ip := func(a *net.TCPAddr) netip.Addr { return a.AddrPort().Addr().Unmap().WithZone("") }
		query += fmt.Sprintf(" WHERE (inet_client_addr(), inet_client_port(), inet_server_addr(), inet_server_port()) = ('%s', %d, '%s', %d)",
			ip(local), local.Port, ip(remote), remote.Port)
	}
	result, err := c.pqConn.ExecContext(ctx, query, nil)
	if err != nil {
		return err
	}
	if n, _ := result.RowsAffected(); n > 0 {
		c.prepared = make(map[string]driver.StmtQueryContext)
	}
	return nil
}

// IsValid is called by database/sql when a connection is free again.
func (c *conn) IsValid() bool {
	return !c.wire.unfit.Load() && c.moves == c.connector.moves.Load() && c.pqConn.IsValid()
}

// ResetSession is called by database/sql before a pooled connection is used. A
// connection that died while it was idle is dropped here, before it costs a
// statement.
func (c *conn) ResetSession(ctx context.Context) error {
	if runtime.GOOS == "windows" { // where a socket cannot be read like a file
		return c.Ping(ctx)
	}
	if !c.IsValid() || time.Since(c.used) > aliveTime && c.wire.closed() {
		return driver.ErrBadConn
	}
	return nil
}

func (c *conn) ExecContext(ctx context.Context, query string, args []driver.NamedValue) (driver.Result, error) {
	result, err := c.pqConn.ExecContext(ctx, query, args)
	return result, c.judge(err)
}

func (c *conn) QueryContext(ctx context.Context, query string, args []driver.NamedValue) (driver.Rows, error) {
	rows, err := c.query(ctx, query, args)
	return rows, c.judge(err)
}

func (c *conn) BeginTx(ctx context.Context, opts driver.TxOptions) (driver.Tx, error) {
	defer context.AfterFunc(ctx, c.wire.expire)() // lib/pq only looks at ctx once BEGIN is answered
	tx, err := c.pqConn.BeginTx(ctx, opts)
	return tx, c.judge(err)
}

// judge returns the error of a statement, but not driver.ErrBadConn, after which
// database/sql would run it again. It drops the connection after errors that
// later statements would meet too.
func (c *conn) judge(err error) error {
	c.used = time.Now()
	switch state := sqlState(err); {
	case state == "25006":
		// The server has become a standby, or the session is read-only by default.
		// If the address has moved to a new primary, older connections have not.
		c.connector.moves.CompareAndSwap(c.moves, c.moves+1)
	case strings.HasPrefix(state, "57P"), strings.HasPrefix(state, "08"):
		// The server is shutting down, or a pooler has lost it.
		c.wire.unfit.Store(true)
	case errors.Is(err, driver.ErrBadConn):
		return errUnknownOutcome
	}
	return err
}

// maxPrepared is how many queries a connection prepares at most, for the server
// keeps them as long as the connection.
const maxPrepared = 200

func (c *conn) query(ctx context.Context, query string, args []driver.NamedValue) (driver.Rows, error) {
	stmt := c.prepared[query]
	if stmt == nil && (c.prepared == nil || len(args) == 0 || len(c.prepared) == maxPrepared) {
		return c.pqConn.QueryContext(ctx, query, args)
	}
	if stmt == nil {
		s, err := c.pqConn.PrepareContext(ctx, query)
		if err != nil {
			return nil, err
		}
		stmt = s.(driver.StmtQueryContext)
		c.prepared[query] = stmt
	}
	rows, err := stmt.QueryContext(ctx, args)
	if state := sqlState(err); state == "0A000" || state == "26000" { // the table has changed, the statement is gone
		c.wire.unfit.Store(true) // for other queries, too
		return c.pqConn.QueryContext(ctx, query, args)
	}
	return rows, err
}

// PrepareContext refuses [sql.DB.Prepare], which would repeat statements. That
// includes lib/pq's COPY.
func (c *conn) PrepareContext(context.Context, string) (driver.Stmt, error) {
	return nil, errors.New("Prepare is not supported: run the statement itself, which direct connections prepare")
}

func (c *conn) Close() error {
	c.wire.socket.SetDeadline(time.Now().Add(closeTimeout))
	return c.pqConn.Close()
}

package main

// postgres.go connects to PostgreSQL. It adds to lib/pq's connections what a
// service needs: no statement that may have had an effect runs twice, none outlives
// its context on a silent server, and statements are prepared where that is safe.
// It knows nothing about tasks.

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
	"net/url"
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
// manual, "Connection Strings"), with these differences:
//
//   - sslmode defaults to disable for a Unix socket or a loopback host, and to
//     require for any other host;
//   - channel_binding=require, which lib/pq does not know, becomes
//     sslmode=verify-full, which protects against the same attacks, with the
//     system's certificates unless sslrootcert names others;
//   - a name that libpq does not know is a setting of the server;
//   - keepalives and gssencmode, except gssencmode=require, have no effect;
//   - in a URL an @ outside user and password must be percent-encoded, as must
//     every #;
//   - service must be the only setting, and PGSERVICE counts only if the string is
//     empty, because in lib/pq the service file overrides the string.
//
// OpenDB does not connect. Its errors never contain a password. The pool has up to
// 10 connections, and closes those that are idle for two minutes, so that a
// serverless database can sleep.
//
// The pool never repeats a statement that may have had an effect: if the connection
// is lost, the outcome is unknown, which is an error. [sql.DB.Prepare] would repeat
// statements, so it fails.
//
// A connection prepares a query with parameters when it first runs it, if the
// connection is direct: over TCP, with no pooler, proxy or NAT in between. One
// plan then serves all values of the parameters, and avoids sorting.
func OpenDB(url string) (*sql.DB, error) { return openDB(url, "auto") }

// openDB is OpenDB with a choice of the connections that prepare: all ("true"),
// none ("false"), or those that are direct ("auto"). Behind a pooler that lends a
// server connection for one transaction, a client's prepared statement may be
// another's.
func openDB(url, prepare string) (*sql.DB, error) {
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

// parseURL reads a connection string as OpenDB's documentation says. lib/pq alone
// drops parts of a URL that it does not understand, sslmode among them, and shows
// parts of passwords in errors.
func parseURL(connString string) (cfg pq.Config, err error) {
	set, err := parseSettings(strings.TrimSpace(connString))
	if err != nil {
		return cfg, err
	}
	switch _, named := set["service"]; {
	case named && len(set) > 1:
		return cfg, errors.New("service must be the only setting, because the service file would win over the others")
	case !named && len(set) > 0:
		set["service"] = "" // or PGSERVICE would win (lib/pq#1344)
	}
	binding := cmp.Or(set["channel_binding"], "prefer")
	keywords := ""
	for name, value := range set {
		if !needless.MatchString(name + "=" + value) {
			keywords += name + "='" + strings.NewReplacer(`\`, `\\`, `'`, `\'`).Replace(value) + "' "
		}
	}
	cfg, err = pq.NewConfig(keywords)
	switch {
	case err != nil:
		return cfg, err
	case isSocket(cfg.Host) && !allLocal(cfg): // lib/pq would use TLS for none of them
		return cfg, errors.New("a Unix socket must not come before a host that is not of this machine")
	case binding == "prefer" || binding == "disable":
	case binding != "require":
		return cfg, fmt.Errorf("channel_binding is %q; it must be disable, prefer or require", binding)
	case cfg.SSLMode == pq.SSLModeDisable:
		return cfg, errors.New("channel_binding=require needs TLS, but sslmode=disable and Unix sockets do without")
	default:
		cfg.SSLMode, cfg.SSLRootCert = pq.SSLModeVerifyFull, cmp.Or(cfg.SSLRootCert, "system")
	}
	if cfg.Host = cmp.Or(cfg.Host, "localhost"); cfg.SSLMode == "" && allLocal(cfg) {
		cfg.SSLMode = pq.SSLModeDisable
	}
	cfg.SSLMode = cmp.Or(cfg.SSLMode, pq.SSLModeRequire)
	cfg.BinaryParameters = true // sends a statement with its parameters, so that a pooler cannot separate them
	return cfg, nil
}

// Forms of connection strings, and what is pasted along with them.
var (
	pastedForm = regexp.MustCompile("^(?:postgres(?:ql)?(\\+\\w+)://|(psql\\b|export\\b|[A-Z_]*(?:URL|URI|DSN)=|[\"'`]))")
	urlForm    = regexp.MustCompile(`^postgres(?:ql)?://(?:([^:/?#\s]*)(?::([^/?#\s]*))?@)?([^@/?#\s]*)` + // user, password, hosts
		`(?:/([^@?#\s]*))?(?:\?([\w.]+=[^@#;&\s]*(?:&[\w.]+=[^@#;&\s]*)*&?)?)?$`) // database, query
	hostForm   = regexp.MustCompile(`^(?:\[(.*)\]|([^:]*))(?::(\d{0,5}))?$`)
	pairForm   = regexp.MustCompile(`(?s)^([A-Za-z_][\w.]*)\s*=\s*(?:'((?:[^'\\]|\\.)*)'|((?:[^\s'\\]|\\.)(?:[^\s\\]|\\.)*)?)(?:\s+|$)`)
	escapeForm = regexp.MustCompile(`(?s)\\(.)`)
)

// needless matches settings that lib/pq does not know and that are not needed: Go
// keeps connections alive, and nothing uses GSS.
var needless = regexp.MustCompile(`^(?:channel_binding=|keepalives(?:_idle|_interval|_count)?=|gssencmode=(?:disable|prefer)$)`)

// errSyntax does not show what is wrong: any part may belong to the password.
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
		pairs := []string{"user=" + m[1], "password=" + m[2], "host=" + strings.Join(hosts, ","), "dbname=" + m[4]}
		if strings.Join(ports, "") != "" {
			ports[0] = cmp.Or(ports[0], "5432") // lib/pq has this default for the others
			pairs = append(pairs, "port="+strings.Join(ports, ","))
		}
		for _, pair := range append(pairs, strings.Split(m[5], "&")...) {
			if pair == "ssl=true" { // JDBC's, which libpq reads like this
				pair = "sslmode=require"
			}
			name, value, _ := strings.Cut(pair, "=")
			value, err := url.PathUnescape(value)
			if err != nil || strings.Contains(value, "\x00") {
				return nil, errSyntax
			}
			if value != "" {
				set[strings.ToLower(name)] = value // as the server reads the names of its settings
			}
		}
		return set, nil
	}
	for s != "" {
		m := pairForm.FindStringSubmatch(s)
		if m == nil {
			return nil, errSyntax
		}
		set[strings.ToLower(m[1])] = escapeForm.ReplaceAllString(m[2]+m[3], "$1")
		s = s[len(m[0]):]
	}
	return set, nil
}

// isSocket reports whether a host is a Unix socket.
func isSocket(host string) bool { return filepath.IsAbs(host) || strings.HasPrefix(host, "@") }

// allLocal reports whether all hosts are Unix sockets or loopback hosts, judged
// as they are given.
func allLocal(cfg pq.Config) bool {
	hosts := append([]pq.ConfigMultihost{{Host: cfg.Host, Hostaddr: cfg.Hostaddr}}, cfg.Multi...)
	return !slices.ContainsFunc(hosts, func(h pq.ConfigMultihost) bool {
		if !h.Hostaddr.IsValid() {
			h.Hostaddr, _ = netip.ParseAddr(h.Host)
		}
		named := strings.EqualFold(h.Host, "localhost") || isSocket(h.Host)
		return !h.Hostaddr.Unmap().IsLoopback() && (h.Hostaddr.IsValid() || !named)
	})
}

// sqlState returns the SQLSTATE of an error that the server reported, by any
// driver, else "".
func sqlState(err error) string {
	var reported interface{ SQLState() string }
	if errors.As(err, &reported) {
		return reported.SQLState()
	}
	return ""
}

// misconfigured matches PgBouncer's messages about wrong settings and passwords.
// PgBouncer uses 08P01 for all its errors; the others may pass.
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
	// A missing certificate file and a TLS alert look like a broken connection.
	_, noFile := errors.AsType[*fs.PathError](err)
	op, ok := errors.AsType[*net.OpError](err)
	_, lost := errors.AsType[net.Error](err)
	return !(connecting && (noFile || ok && op.Op == "remote error")) && (lost || connecting && passing.MatchString(err.Error()) ||
		errors.Is(err, errUnknownOutcome) || errors.Is(err, driver.ErrBadConn) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF))
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
	prepare string
	epoch   atomic.Int64 // connections of an earlier one are dropped
}

// Driver is for [sql.DB.Driver].
func (c *connector) Driver() driver.Driver { return pq.Driver{} }

func (c *connector) Connect(ctx context.Context) (driver.Conn, error) {
	ctx, cancel := context.WithCancel(ctx) // ends what a failure leaves
	defer cancel()
	timeout := cmp.Or(max(c.cfg.ConnectTimeout, 0), connectTimeout)
	if deadline, ok := ctx.Deadline(); ok {
		timeout = min(timeout, time.Until(deadline))
	}
	cfg := c.cfg
	cfg.ConnectTimeout = 0               // or lib/pq would remove the socket's deadline too early
	lib, _ := pq.NewConnectorConfig(cfg) // cannot fail
	// lib/pq tries the hosts in turn: a silent one leaves time for the others.
	cn := &conn{connector: c, epoch: c.epoch.Load(), timeout: timeout / time.Duration(1+len(cfg.Multi))}
	lib.Dialer(cn)
	dc, err := lib.Connect(ctx)
	if errors.Is(err, pq.ErrSSLNotSupported) {
		err = fmt.Errorf("%w (sslmode=disable connects without TLS)", err)
	}
	if err != nil {
		return nil, &connectError{err}
	}
	cn.pqConn = dc.(pqConn)
	err = cn.setUp(ctx)
	if !cn.detach() {
		err = cmp.Or(err, ctx.Err())
	}
	if err = cmp.Or(err, cn.socket.SetDeadline(time.Time{})); err != nil {
		_ = cn.Close()
		return nil, &connectError{err}
	}
	return cn, nil
}

// How long a server may take.
const (
	connectTimeout = 10 * time.Second       // to accept a connection, unless connect_timeout is set
	cancelTimeout  = 400 * time.Millisecond // to accept the request to cancel a statement
	cancelGrace    = 50 * time.Millisecond  // to answer, after a statement's context has ended
	closeTimeout   = 100 * time.Millisecond // to accept the end of a connection
)

// aliveTime is how long after its last statement a connection is assumed to be
// alive without a check, which would cost a system call. A statement that
// fails sooner than lostTime was sent on a connection that had died before.
const aliveTime, lostTime = time.Millisecond, time.Second

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

// conn is a connection of lib/pq, and dials for it.
type conn struct {
	pqConn    // nil while connecting
	pq.Dialer // nil: lib/pq asks for its methods, but calls DialContext
	connector *connector
	epoch     int64         // the connector's, when this connection was begun
	timeout   time.Duration // for each host
	socket    net.Conn
	detach    func() bool                        // makes socket independent of the context of Connect
	unfit     atomic.Bool                        // for another statement
	used      time.Time                          // when it was last taken from the pool, or answered
	prepared  map[string]driver.StmtQueryContext // by query; nil: none are
}

// DialContext dials the server: for Connect, and for lib/pq's request to cancel a
// statement whose context has ended. A silent server does not answer that request,
// and PostgreSQL ignores one that arrives before the statement has begun. So the
// connection then gets a deadline, and runs no further statement, which a late
// request could cancel.
func (c *conn) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	dialer := net.Dialer{Deadline: time.Now().Add(c.timeout)}
	if c.pqConn != nil {
		c.expire()
		dialer.Deadline = time.Now().Add(cancelTimeout)
	}
	socket, err := dialer.DialContext(ctx, network, address)
	if err != nil {
		return nil, err
	}
	err = socket.SetDeadline(dialer.Deadline)
	if c.pqConn == nil {
		c.socket, c.detach = socket, context.AfterFunc(ctx, func() { _ = socket.SetDeadline(time.Now()) })
	}
	return socket, err
}

func (c *conn) expire() {
	c.unfit.Store(true)
	_ = c.socket.SetDeadline(time.Now().Add(cancelGrace))
}

// setUp makes a connection prepare its queries, if that is asked for or safe. One
// statement checks that it is safe and changes settings of the session: behind a
// pooler, other clients would get them.
func (c *conn) setUp(ctx context.Context) error {
	// One plan serves all values. PostgreSQL makes it without knowing how short a
	// page is. Without these settings it might read and sort what an index has in
	// order, or compile the plan.
	query := "SELECT set_config(name, value, false) FROM (VALUES " +
		"('plan_cache_mode', 'force_generic_plan'), ('enable_sort', 'off'), ('jit', 'off')) AS settings (name, value)"
	local, tcp := c.socket.LocalAddr().(*net.TCPAddr)
	switch {
	case c.connector.prepare == "false" || c.connector.prepare == "auto" && !tcp:
		return nil
	case c.connector.prepare == "auto": // PostgreSQL has other addresses or ports with a pooler, proxy or NAT in between
		remote := c.socket.RemoteAddr().(*net.TCPAddr)
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
	return !c.unfit.Load() && c.epoch == c.connector.epoch.Load() && c.pqConn.IsValid()
}

// ResetSession is called by database/sql before a pooled connection is used. A
// connection that died while it was idle is dropped here, before it costs a
// statement.
func (c *conn) ResetSession(context.Context) error {
	if !c.IsValid() || time.Since(c.used) > aliveTime && c.closed() {
		return driver.ErrBadConn
	}
	c.used = time.Now()
	return nil
}

// closed reports whether the server has closed the connection, or has sent
// something unasked, such as the reason for closing.
func (c *conn) closed() bool {
	quiet := false
	raw, _ := c.socket.(syscall.Conn).SyscallConn() // cannot fail
	_ = raw.Read(func(fd uintptr) bool { quiet = wouldBlock(syscall.Read, fd); return true })
	return !quiet
}

// wouldBlock reports whether a file descriptor in non-blocking mode has nothing
// to read. read is [syscall.Read], whose first parameter has another type on
// each system. Windows cannot read a socket like a file.
func wouldBlock[FD ~int | ~uintptr](read func(FD, []byte) (int, error), fd uintptr) bool {
	var b [1]byte
	_, err := read(FD(fd), b[:])
	return err == syscall.EAGAIN || runtime.GOOS == "windows"
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
	defer context.AfterFunc(ctx, c.expire)() // lib/pq only looks at ctx once BEGIN is answered
	tx, err := c.pqConn.BeginTx(ctx, opts)
	return tx, c.judge(err)
}

// judge returns the error of a statement, but not driver.ErrBadConn, after which
// database/sql would run it again. It drops the connection after errors that
// later statements would meet too.
func (c *conn) judge(err error) error {
	took := time.Since(c.used)
	c.used = time.Now()
	switch state := sqlState(err); {
	case state == "25006", state == "" && transient(err) && took < lostTime && !c.unfit.Load():
		// The server has become a standby, or the session is read-only by default:
		// if the address has moved to a new primary, older connections have not. Or
		// the connection had died, and so may have others that are idle.
		c.connector.epoch.CompareAndSwap(c.epoch, c.epoch+1)
	case strings.HasPrefix(state, "57P"), strings.HasPrefix(state, "08"):
		// The server is shutting down, or a pooler has lost it.
		c.unfit.Store(true)
	}
	if errors.Is(err, driver.ErrBadConn) {
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
		c.unfit.Store(true) // for other queries, too; this one has had no effect
		return c.pqConn.QueryContext(ctx, query, args)
	}
	return rows, err
}

// PrepareContext refuses [sql.DB.Prepare], which would repeat statements. That
// includes lib/pq's COPY.
func (c *conn) PrepareContext(context.Context, string) (driver.Stmt, error) {
	return nil, errors.New("db.Prepare is not supported: run the statement itself, which direct connections prepare")
}

func (c *conn) Close() error {
	_ = c.socket.SetDeadline(time.Now().Add(closeTimeout))
	return c.pqConn.Close()
}

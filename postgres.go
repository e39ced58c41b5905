package main

// postgres.go is how PostgreSQL is reached: the connection string made right,
// the pool, and connections that neither run a write twice nor outlast a
// request's deadline when the server falls silent. It knows nothing of tasks.

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/netip"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/lib/pq"
)

// OpenDB returns a pool of connections to the PostgreSQL that url names: a URL
// or a string of keywords and values, as libpq takes them (PostgreSQL's manual,
// §34.1.1), with these differences:
//
//   - sslmode is by default disable for a Unix socket or a loopback host, and
//     require for any other;
//   - channel_binding=require, which lib/pq does not know, becomes
//     sslmode=verify-full, which protects against the same impostors, with the
//     system's certificates unless sslrootcert names others;
//   - binary_parameters is always yes: lib/pq then sends a statement and its
//     parameters together, and a pooler in transaction mode cannot come between.
//
// It does not connect. Its errors never contain a password. The pool is of 10
// connections, which are closed when they have been idle for two minutes, so
// that a serverless database can sleep.
//
// The pool runs a statement again when its connection turns out to be dead, as
// [database/sql] does, but only if it is a SELECT or was not sent. Any other has
// then an unknown outcome, which is an error.
func OpenDB(url string) (*sql.DB, error) { return openDB(url, false) }

// OpenPreparedDB is OpenDB for a PostgreSQL that is reached without a pooler in
// transaction mode: a connection prepares each statement when it first comes, so
// that the server does not parse and plan it again. The statements should be few.
func OpenPreparedDB(url string) (*sql.DB, error) { return openDB(url, true) }

func openDB(url string, prepare bool) (*sql.DB, error) {
	cfg, err := parseURL(url)
	if err != nil {
		return nil, err
	}
	c, err := pq.NewConnectorConfig(cfg)
	if err != nil {
		return nil, err
	}
	c.Dialer(&dialer{hosts: 1 + len(cfg.Multi)})
	db := sql.OpenDB(connector{c, prepare})
	db.SetMaxOpenConns(10)
	db.SetMaxIdleConns(10)
	db.SetConnMaxIdleTime(2 * time.Minute)
	return db, nil
}

// parseURL returns what OpenDB's documentation says of url.
func parseURL(url string) (pq.Config, error) {
	cfg, err := pq.NewConfig(url)
	if err != nil && strings.HasPrefix(err.Error(), "pq: ") {
		return cfg, err
	}
	// Of an error about the syntax even a part could be of the password, as
	// could the name of a setting, if it is the beginning of an unknown URL.
	for name := range cfg.Runtime {
		if strings.Contains(name, ":") {
			err = errors.ErrUnsupported
		}
	}
	if err != nil {
		return cfg, errors.New("neither a URL nor keywords and values of PostgreSQL (a URL begins with postgres: and has its password percent-encoded; among keywords a password with spaces must be quoted)")
	}
	splitHost(&cfg.Host, &cfg.Port)
	for i := range cfg.Multi {
		splitHost(&cfg.Multi[i].Host, &cfg.Multi[i].Port)
	}
	cfg.BinaryParameters = true
	binding, ok := cfg.Runtime["channel_binding"]
	delete(cfg.Runtime, "channel_binding")
	switch {
	case isSocket(cfg.Host) && !allLocal(cfg): // for which lib/pq gives up TLS
		return cfg, errors.New("a Unix socket must not come before a host that is not of this machine")
	case !ok || binding == "prefer" || binding == "disable":
	case binding != "require":
		return cfg, fmt.Errorf("channel_binding is %q, which is none of disable, prefer and require", binding)
	case cfg.SSLMode == pq.SSLModeDisable:
		return cfg, errors.New("channel_binding=require needs TLS, which sslmode=disable and Unix sockets do without")
	default:
		cfg.SSLMode = pq.SSLModeVerifyFull
		if cfg.SSLRootCert == "" {
			cfg.SSLRootCert = "system"
		}
	}
	if cfg.SSLMode == "" {
		cfg.SSLMode = pq.SSLModeRequire
		if allLocal(cfg) {
			cfg.SSLMode = pq.SSLModeDisable
		}
	}
	return cfg, nil
}

// splitHost takes from a host what lib/pq leaves there of a URL: the port if
// there are several hosts, and the brackets of an IPv6 address.
func splitHost(host *string, port *uint16) {
	if h, p, err := net.SplitHostPort(*host); err == nil {
		if n, err := strconv.ParseUint(p, 10, 16); err == nil {
			*host, *port = h, uint16(n)
		}
	}
	*host = strings.Trim(*host, "[]")
}

// isSocket reports whether a host is a Unix socket.
func isSocket(host string) bool { return filepath.IsAbs(host) || strings.HasPrefix(host, "@") }

// allLocal reports whether all hosts are Unix sockets or loopback hosts, judged
// as they are given.
func allLocal(cfg pq.Config) bool {
	hosts := append([]pq.ConfigMultihost{{Host: cfg.Host, Hostaddr: cfg.Hostaddr}}, cfg.Multi...)
	return !slices.ContainsFunc(hosts, func(h pq.ConfigMultihost) bool {
		addr := h.Hostaddr
		if !addr.IsValid() {
			addr, _ = netip.ParseAddr(h.Host)
		}
		if addr.IsValid() {
			return !addr.Unmap().IsLoopback()
		}
		return h.Host != "localhost" && !isSocket(h.Host)
	})
}

// sqlState returns the SQLSTATE of an error that the server reported, else "".
func sqlState(err error) string {
	if err, ok := errors.AsType[*pq.Error](err); ok {
		return err.SQLState()
	}
	return ""
}

// transient reports whether an error may pass without anybody changing the
// statement, the settings or the schema: the server is out of reach, starting
// or stopping, at its limits, too slow, or a standby for the moment. The
// classes are those of PostgreSQL's manual, appendix A.
func transient(err error) bool {
	if state := sqlState(err); state != "" {
		switch state[:2] {
		case "08": // connection exception; PgBouncer reports everything so
			return !strings.Contains(err.Error(), "startup parameter")
		case "25", // invalid transaction state: read-only
			"40", // transaction rollback
			"53", // insufficient resources
			"57", // operator intervention: shutdown, timeout
			"58": // system error
			return true
		}
		return state == "55P03" // lock_not_available
	}
	if _, ok := errors.AsType[*connectError](err); ok {
		// A broken connection or a standby may pass, but not what lib/pq,
		// crypto/x509 or the other side of crypto/tls objects to. A missing file
		// and an alert of TLS look like a broken connection.
		_, noFile := errors.AsType[*fs.PathError](err)
		op, ok := errors.AsType[*net.OpError](err)
		alert := ok && op.Op == "remote error"
		return !noFile && !alert && (lost(err) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) ||
			strings.Contains(err.Error(), "hot standby mode") || strings.Contains(err.Error(), "session is "))
	}
	return lost(err) || errors.Is(err, errUnknownOutcome)
}

// lost reports whether an error says that a connection broke.
func lost(err error) bool {
	_, ok := errors.AsType[net.Error](err)
	return ok || errors.Is(err, driver.ErrBadConn)
}

// errUnknownOutcome is the error of a statement that may or may not have been
// executed, or may still be.
var errUnknownOutcome = errors.New("connection lost, the outcome of the statement is unknown")

// connectError is the error of an attempt to connect.
type connectError struct{ err error }

func (e *connectError) Error() string { return "connect to PostgreSQL: " + e.err.Error() }
func (e *connectError) Unwrap() error { return e.err }

// connector makes connections of lib/pq into conns.
type connector struct {
	*pq.Connector
	prepare bool
}

func (c connector) Connect(ctx context.Context) (driver.Conn, error) {
	var w *wire
	dc, err := c.Connector.Connect(context.WithValue(ctx, wireKey{}, &w))
	if err != nil {
		return nil, &connectError{err}
	}
	cn := &conn{pqConn: dc.(pqConn), wire: w}
	if c.prepare {
		cn.prepared = make(map[string]driver.StmtQueryContext)
		// One plan serves all values, which PostgreSQL does not expect. Nor does
		// it know then how short a page is: without these settings it might read
		// and sort what an index has in order, or compile it. (A SELECT, because
		// the loss of the connection does no harm.)
		_, err := cn.ExecContext(ctx, "SELECT set_config(name, value, false) FROM (VALUES "+
			"('plan_cache_mode', 'force_generic_plan'), ('enable_sort', 'off'), ('jit', 'off')) AS settings (name, value)", nil)
		if err != nil {
			cn.Close()
			return nil, &connectError{err}
		}
	}
	w.deadline = time.Time{}
	return cn, nil
}

// Limits of what a server may take its time for.
const (
	connectTimeout = 10 * time.Second       // to accept a connection
	cancelTimeout  = 400 * time.Millisecond // to accept the request to cancel a statement
	cancelGrace    = 50 * time.Millisecond  // to answer, after the statement's deadline
	closeTimeout   = 100 * time.Millisecond // to take leave
)

// aliveTime is how long after its last statement a connection is taken to be
// alive without a look, which would cost a system call.
const aliveTime = time.Millisecond

// dialer opens the wires of connections, which tell by the context that they
// want theirs, and of lib/pq's requests to cancel a statement, which do not.
type dialer struct {
	net.Dialer
	hosts int // lib/pq tries them in turn
}

type wireKey struct{}

func (d *dialer) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	into, ok := ctx.Value(wireKey{}).(**wire)
	left := cancelTimeout
	if ok {
		left = connectTimeout
		if deadline, ok := ctx.Deadline(); ok {
			left = min(left, time.Until(deadline))
		}
		left /= time.Duration(d.hosts) // a silent host leaves time for the others
	}
	deadline := time.Now().Add(left)
	ctx, cancel := context.WithDeadline(ctx, deadline)
	defer cancel()
	c, err := d.Dialer.DialContext(ctx, network, address)
	if err != nil {
		return nil, err
	}
	if !ok {
		return c, c.SetDeadline(deadline)
	}
	*into = &wire{Conn: c, deadline: deadline}
	return *into, nil
}

// DialTimeout is of no use here, but lib/pq's interface has it.
func (d *dialer) DialTimeout(network, address string, timeout time.Duration) (net.Conn, error) {
	return net.DialTimeout(network, address, timeout)
}

// wire is the network connection of a conn. Each write starts anew the time that
// the server has to take it and to answer, for a silent server would otherwise
// hold a statement long after its context has ended.
type wire struct {
	net.Conn
	deadline time.Time // zero: none
	sent     bool      // whether a byte was written since the statement began
	used     time.Time // when the last statement ended
}

func (w *wire) Write(p []byte) (int, error) {
	w.SetDeadline(w.deadline)
	n, err := w.Conn.Write(p)
	w.sent = w.sent || n > 0
	return n, err
}

// begin gives the statement that follows the time until ctx's deadline, and a
// little more, for lib/pq cancels it then, which a healthy server answers.
func (w *wire) begin(ctx context.Context) {
	w.sent = false
	if deadline, ok := ctx.Deadline(); ok {
		w.deadline = deadline.Add(cancelGrace)
	}
}

// end ends what begin began, except that the rows of a statement still have its
// deadline. It returns err such that database/sql, which runs a statement again
// after driver.ErrBadConn, does so only where that is harmless.
func (w *wire) end(query string, err error) error {
	w.deadline, w.used = time.Time{}, time.Now()
	if err == nil || !lost(err) {
		return err
	}
	if !w.sent || isSelect(query) {
		return driver.ErrBadConn
	}
	return fmt.Errorf("%w (%v)", errUnknownOutcome, err)
}

// closed reports whether the server has closed the connection, or has sent what
// nobody asked for, such as the reason why it is about to.
func (w *wire) closed() bool {
	raw, err := w.Conn.(syscall.Conn).SyscallConn()
	if err != nil {
		return true
	}
	quiet := false
	w.SetDeadline(time.Time{}) // the last statement's, past which nothing is read
	err = raw.Read(func(fd uintptr) bool {
		quiet = wouldBlock(syscall.Read, fd)
		return true
	})
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
	driver.SessionResetter
	driver.Validator
}

// conn is a connection of lib/pq that has a wire.
type conn struct {
	pqConn
	wire     *wire
	prepared map[string]driver.StmtQueryContext // by statement; nil: none are
	ended    func() error                       // tells whether the context of a prepared statement has ended
}

// IsValid is called by database/sql when a connection is free again. If the
// context of its statement had ended, lib/pq's request to cancel that may be on
// its way still, and must not meet the next one. lib/pq sees to that itself
// except with prepared statements.
func (c *conn) IsValid() bool {
	return (c.ended == nil || c.ended() == nil) && c.pqConn.IsValid()
}

// ResetSession is called by database/sql before a pooled connection is used. A
// connection that died while it was idle is dropped here, before it costs a
// statement.
func (c *conn) ResetSession(ctx context.Context) error {
	c.ended = nil
	if runtime.GOOS == "windows" { // where a socket cannot be read like a file
		return c.Ping(ctx)
	}
	if time.Since(c.wire.used) > aliveTime && c.wire.closed() {
		return driver.ErrBadConn
	}
	return c.pqConn.ResetSession(ctx)
}

func (c *conn) Ping(ctx context.Context) error {
	c.wire.begin(ctx)
	return c.wire.end("SELECT", c.pqConn.Ping(ctx))
}

func (c *conn) QueryContext(ctx context.Context, query string, args []driver.NamedValue) (driver.Rows, error) {
	c.wire.begin(ctx)
	rows, err := c.query(ctx, query, args)
	return rows, c.wire.end(query, err)
}

func (c *conn) query(ctx context.Context, query string, args []driver.NamedValue) (driver.Rows, error) {
	if c.prepared == nil {
		return c.pqConn.QueryContext(ctx, query, args)
	}
	stmt, ok := c.prepared[query]
	if !ok {
		s, err := c.pqConn.PrepareContext(ctx, query)
		if err != nil {
			return nil, err
		}
		stmt = s.(driver.StmtQueryContext)
		c.prepared[query] = stmt
	}
	c.ended = ctx.Err
	rows, err := stmt.QueryContext(ctx, args)
	switch sqlState(err) {
	case "0A000", "26000": // the table has changed, the statement is gone
		c.wire.sent = false // nor was it executed: another connection will
		return nil, driver.ErrBadConn
	}
	return rows, err
}

// isSelect reports whether a statement may be run twice.
func isSelect(query string) bool { return strings.HasPrefix(query, "SELECT") }

func (c *conn) ExecContext(ctx context.Context, query string, args []driver.NamedValue) (driver.Result, error) {
	c.wire.begin(ctx)
	result, err := c.pqConn.ExecContext(ctx, query, args)
	return result, c.wire.end(query, err)
}

func (c *conn) Close() error {
	c.wire.deadline = time.Now().Add(closeTimeout)
	return c.pqConn.Close()
}

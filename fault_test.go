package main

// fault_test.go breaks what lies between the service and PostgreSQL, and holds
// the rows that are there afterwards against what the answers promised: 2xx is
// applied once, 503 at most once. Every fault here was first seen to do damage
// with the protection against it taken out.

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime/pprof"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/lib/pq"
)

// Times that are long enough on any machine: none is ever asserted tightly.
const (
	patience = 40 * time.Second // for what must happen
	promptly = 10 * time.Second // for what must happen without waiting for anything
	deadline = 5 * time.Second  // of requests that a silent server keeps waiting
)

// waitFor polls done until it is true.
func waitFor(t testing.TB, what string, done func() bool) {
	t.Helper()
	for start := time.Now(); !done(); time.Sleep(5 * time.Millisecond) {
		if time.Since(start) > patience {
			t.Fatalf("waited in vain: %s", what)
		}
	}
}

// inBothModes runs a test with statements that are prepared and, behind a proxy,
// with others.
func inBothModes(t *testing.T, test func(t *testing.T, prepare string)) {
	for name, prepare := range map[string]string{"prepared": "true", "unprepared": "auto"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			test(t, prepare)
		})
	}
}

// queryInt returns the number that a query on a connection of its own returns.
func queryInt(t testing.TB, url, query string, args ...any) (n int) {
	t.Helper()
	db := open(t, url)
	defer db.Close()
	if err := db.QueryRow(query, args...).Scan(&n); err != nil {
		t.Fatalf("%s: %v", query, err)
	}
	return n
}

// newAPIWithPool is newAPIOn with a pool of a size and a kind.
func newAPIWithPool(t testing.TB, dbURL string, conns int, prepare string, opts Options) *api {
	t.Helper()
	db, err := openDB(dbURL, prepare)
	if err != nil {
		t.Fatal(err)
	}
	db.SetMaxOpenConns(conns)
	db.SetMaxIdleConns(conns)
	return newAPIWithDB(t, dbURL, db, opts)
}

// newTasks inserts n tasks, behind the service's back, and returns their ids.
func (a *api) newTasks(n int) (ids []string) {
	a.Helper()
	for start := time.Now(); len(ids) < n; start = start.Add(time.Microsecond) {
		ids = append(ids, newID(start))
	}
	if _, err := a.db.Exec(`INSERT INTO tasks (id, title) SELECT unnest($1::uuid[]), 'old'`, ids); err != nil {
		a.Fatal(err)
	}
	return ids
}

// want503 fails the test unless the answer is a 503 as it should be.
func (a *api) want503(got *answer) *answer {
	a.Helper()
	a.want(http.StatusServiceUnavailable, got)
	a.outcome(got)
	return got
}

// fault is what a proxy does to one statement.
type fault int

const (
	pass        fault = iota
	cutBefore         // closes the connection; the server never gets the statement
	resetBefore       // the same with RST instead of FIN
	cutWithin         // closes the connection in the midst of the reply
	cutAfter          // closes it before the reply
	resetAfter
	stall    // keeps the reply and the connection
	stallEnd // keeps the end of the reply, which says that the transaction has ended
	late     // keeps the statement until the service has given up, and forwards it then
	faults
)

func (f fault) String() string {
	return []string{"pass", "cutBefore", "resetBefore", "cutWithin", "cutAfter", "resetAfter", "stall", "stallEnd", "late"}[f]
}

// executed reports whether the server executes a statement that suffers f.
func (f fault) executed() bool { return f != cutBefore && f != resetBefore }

// proxy stands between a service and PostgreSQL. It knows of PostgreSQL's
// protocol where a statement ends and where its reply does.
type proxy struct {
	testing.TB
	url     string                 // of the database, through the proxy
	socket  atomic.Pointer[string] // of the server for new clients
	conns   atomic.Int64
	fate    atomic.Pointer[func(executes bool) fault] // asked for each statement; nil: pass
	counts  [faults]atomic.Int64                      // statements by what was done to them
	age     atomic.Int64                              // what serves a connection that began at another age resets it
	mu      sync.Mutex                                // guards chance
	chance  *rand.Rand
	cancels atomic.Int64 // requests to cancel a statement that are under way
	cancel  sync.RWMutex // held for reading by each request to cancel a statement
}

// newProxy returns a proxy to the database that dbURL names.
func newProxy(t testing.TB, dbURL string) *proxy {
	t.Helper()
	listener := listen(t, "127.0.0.1:0")
	t.Cleanup(func() { listener.Close() })
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	p := &proxy{TB: t, chance: rand.New(rand.NewPCG(seed, 0)), url: onTCP(dbURL, listener.Addr())}
	p.moveTo(dbURL)
	go func() {
		for {
			client, err := listener.Accept()
			if err != nil {
				return
			}
			p.conns.Add(1)
			go p.serve(client.(*net.TCPConn))
		}
	}()
	return p
}

// moveTo makes the proxy connect new clients to the server of dbURL.
func (p *proxy) moveTo(dbURL string) {
	cfg, err := parseURL(dbURL)
	if err != nil {
		p.Fatal(err)
	}
	socket := fmt.Sprintf("%s/.s.PGSQL.%d", cfg.Host, cfg.Port)
	p.socket.Store(&socket)
}

// wait waits until all connections have ended, those with late statements too.
func (p *proxy) wait() {
	waitFor(p, "connections to end", func() bool { return p.conns.Load() == 0 })
}

// intN returns a random number below n.
func (p *proxy) intN(n int) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.chance.IntN(n)
}

// do makes the proxy ask fate what to do to each statement from now on, which
// is either to be executed or, if executes is false, only to be prepared.
func (p *proxy) do(fate func(executes bool) fault) { p.fate.Store(&fate) }

// times makes the proxy do f to the next n statements that are to be executed.
func (p *proxy) times(n int64, f fault) {
	var left atomic.Int64
	left.Store(n)
	p.do(func(executes bool) fault {
		if executes && left.Add(-1) >= 0 {
			return f
		}
		return pass
	})
}

// serve forwards what comes on one connection, until one end closes it.
func (p *proxy) serve(client *net.TCPConn) {
	defer p.conns.Add(-1)
	defer client.Close()
	server, err := net.Dial("unix", *p.socket.Load())
	if err != nil {
		return
	}
	defer server.Close()
	fromClient, fromServer := bufio.NewReader(client), bufio.NewReader(server)
	startup, err := message(fromClient, 0)
	if err != nil {
		return
	}
	if len(startup) == 16 { // asks to cancel the statement of another connection
		p.cancels.Add(1)
		defer p.cancels.Add(-1)
		p.cancel.RLock()
		defer p.cancel.RUnlock()
		server.Write(startup)
		io.Copy(client, server)
		return
	}
	server.Write(startup)
	age := p.age.Load()
	greeting, err := messages(fromServer, "Z")
	client.Write(greeting)
	for err == nil {
		var statement, reply []byte
		if statement, err = messages(fromClient, "QSX"); err != nil {
			return
		}
		f := pass
		if p.age.Load() != age {
			f = resetBefore
		} else if fate := p.fate.Load(); fate != nil && statement[0] != 'X' {
			f = (*fate)(executes(statement))
		}
		p.counts[f].Add(1)
		if f == resetBefore || f == resetAfter {
			client.SetLinger(0)
		}
		if !f.executed() {
			return
		}
		if f == late {
			io.Copy(io.Discard, fromClient)
		}
		server.Write(statement)
		reply, err = messages(fromServer, "Z")
		switch f {
		case cutWithin:
			client.Write(reply[:p.intN(len(reply))])
			return
		case cutAfter, resetAfter:
			return
		case stallEnd:
			client.Write(reply[:len(reply)-len("Z0000I")])
			fallthrough
		case stall:
			io.Copy(io.Discard, fromClient)
			return
		}
		client.Write(reply)
	}
}

// messages reads messages up to one of the given types.
func messages(r *bufio.Reader, types string) (all []byte, err error) {
	for {
		m, err := message(r, 1)
		all = append(all, m...)
		if err != nil || strings.IndexByte(types, m[0]) >= 0 {
			return all, err
		}
	}
}

// executes reports whether the messages of a statement are more than what
// prepares it, or the connection for it.
func executes(statement []byte) bool {
	if bytes.HasPrefix(statement[5:], []byte("SELECT set_config")) {
		return false
	}
	r := bufio.NewReader(bytes.NewReader(statement))
	_, err := messages(r, "QE")
	return err == nil
}

// message reads a message that has n bytes before its length.
func message(r *bufio.Reader, n int) ([]byte, error) {
	head, err := r.Peek(n + 4)
	if err != nil {
		return nil, err
	}
	m := make([]byte, n+int(binary.BigEndian.Uint32(head[n:])))
	_, err = io.ReadFull(r, m)
	return m, err
}

// action is an operation of the API. In path, body, key and applied %[1]s is the
// id of a task and %[2]s a text that no other request has.
type action struct {
	name, method, path, body, key string
	success                       int
	applied                       string // title and completed of the task afterwards; "": a read
}

var (
	opCreate        = action{"create", "POST", "/api/tasks", `{"title": "%[2]s"}`, "", 201, "%[2]s false"}
	opCreateWithKey = action{"create with a key", "POST", "/api/tasks", `{"title": "%[2]s"}`, "key-%[2]s", 201, "%[2]s false"}
	opList          = action{"list", "GET", "/api/tasks?limit=3", "", "", 200, ""}
	opGet           = action{"get", "GET", "/api/tasks/%[1]s", "", "", 200, ""}
	opReplace       = action{"replace", "PUT", "/api/tasks/%[1]s", `{"title": "%[2]s", "completed": true}`, "", 200, "%[2]s true"}
	opPatch         = action{"patch", "PATCH", "/api/tasks/%[1]s", `{"title": "%[2]s"}`, "", 200, "%[2]s false"}
	opFlip          = action{"flip", "PATCH", "/api/tasks/%[1]s/complete", "", "", 200, "old true"}
	opSet           = action{"set", "PATCH", "/api/tasks/%[1]s/complete", `{"completed": true}`, "", 200, "old true"}
	opDelete        = action{"delete", "DELETE", "/api/tasks/%[1]s", "", "", 204, "gone"}

	actions = []action{opCreate, opCreateWithKey, opList, opGet, opReplace, opPatch, opFlip, opSet, opDelete}
)

// call is an operation that was asked for once, of a task that no other is about.
type call struct {
	action
	id, text   string
	status     int
	start, end time.Time
	slowest    time.Duration // of its attempts
}

func (c call) ok() bool { return c.status == c.success }

func (c call) fill(format string) string {
	return strings.NewReplacer("%[1]s", c.id, "%[2]s", c.text).Replace(format)
}

// workload sends requests and keeps what became of them.
type workload struct {
	*api
	ids      []string     // of tasks as they were made
	used     atomic.Int64 // how many of ids have been
	failures atomic.Int64 // answers with 503
	mu       sync.Mutex   // guards calls
	calls    []call
}

func newWorkload(a *api, requests int) *workload {
	a.log.expected.Store(true)
	return &workload{api: a, ids: a.newTasks(requests)}
}

// send asks for an operation. insist makes it repeat, until it succeeds, what is
// safe to repeat because it has a key.
func (w *workload) send(op action, insist bool) call {
	n := w.used.Add(1) - 1
	if int(n) >= len(w.ids) {
		w.Fatal("more requests than tasks to send them for")
	}
	c := call{action: op, id: w.ids[n], text: fmt.Sprintf("text-%d", n), start: time.Now()}
	var headers []string
	if op.key != "" {
		headers = []string{"Idempotency-Key", c.fill(op.key)}
	}
	for {
		asked := time.Now()
		got := w.do(op.method, c.fill(op.path), c.fill(op.body), headers...)
		c.status, c.end = got.StatusCode, time.Now()
		c.slowest = max(c.slowest, c.end.Sub(asked))
		if c.ok() {
			if op.name == opGet.name && (w.task(got).ID != c.id || w.task(got).Version != 1) {
				w.Errorf("asked for task %s, never changed, got %s", c.id, got.body)
			}
			break
		}
		w.want503(got)
		w.failures.Add(1)
		if !insist || op.key == "" || c.end.Sub(c.start) > patience {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	w.mu.Lock()
	w.calls = append(w.calls, c)
	w.mu.Unlock()
	return c
}

// start sends random operations from several clients until stop is called.
func (w *workload) start(clients int, pause time.Duration) (stop func()) {
	var done atomic.Bool
	var running sync.WaitGroup
	for range clients {
		running.Go(func() {
			for !done.Load() {
				w.send(actions[rand.IntN(len(actions))], true)
				time.Sleep(pause)
			}
		})
	}
	stop = func() { done.Store(true); running.Wait() }
	w.Cleanup(stop)
	return stop
}

// recovered waits until the service is ready again, and then until many more
// requests have been sent. It returns when the service was ready.
func (w *workload) recovered() (ready time.Time) {
	w.Helper()
	waitFor(w, "the service to be ready", func() bool { return w.do("GET", "/readyz", "").StatusCode == http.StatusOK })
	ready, enough := time.Now(), w.used.Load()+200
	waitFor(w, "requests to go on", func() bool { return w.used.Load() > enough })
	return ready
}

// audit compares all rows of the database with what the answers promised. It
// returns how many times each call was applied.
func (w *workload) audit(dbURL string) (applied []int) {
	w.Helper()
	db := open(w, dbURL)
	defer db.Close()
	// What the service has given up may still be under way.
	waitFor(w, "all statements to end", func() bool {
		return queryInt(w, dbURL, `SELECT count(*) FROM pg_stat_activity
			WHERE datname = current_database() AND pid <> pg_backend_pid() AND state <> 'idle'`) == 0
	})
	var text []byte
	err := db.QueryRow("SELECT coalesce(json_agg(t), '[]') FROM (SELECT id, title, completed, version FROM tasks) t").Scan(&text)
	var tasks []Task
	if err := errors.Join(err, json.Unmarshal(text, &tasks)); err != nil {
		w.Fatal(err)
	}
	byID, byTitle := map[string]Task{}, map[string][]Task{}
	for _, t := range tasks {
		byID[t.ID] = t
		byTitle[t.Title] = append(byTitle[t.Title], t)
	}
	for _, c := range w.calls {
		got, there := byID[c.id]
		times := int(got.Version) - 1
		switch c.name {
		case opDelete.name:
			times = map[bool]int{true: 0, false: 1}[there]
		case opCreate.name, opCreateWithKey.name:
			if times = len(byTitle[c.text]); times > 0 {
				got = byTitle[c.text][0]
			}
		}
		state := "gone"
		if there {
			state = fmt.Sprint(got.Title, " ", got.Completed)
		}
		write := c.applied != ""
		if times < 0 || times > 1 || times == 1 && (!write || state != c.fill(c.applied)) || times == 0 && write && c.ok() {
			w.Errorf("%s %s %q: answered with %d, applied %d times, as %+v", c.name, c.id, c.text, c.status, times, got)
		}
		applied = append(applied, times)
	}
	w.Logf("%d requests, %d answers with 503", len(w.calls), w.failures.Load())
	return applied
}

// Each operation suffers each fault once.
func TestFaultEachOperation(t *testing.T) {
	t.Parallel()
	inBothModes(t, func(t *testing.T, prepare string) {
		for f := pass + 1; f < faults; f++ {
			t.Run(f.String(), func(t *testing.T) {
				t.Parallel()
				testFaultEachOperation(t, f, prepare)
			})
		}
	})
}

func testFaultEachOperation(t *testing.T, f fault, prepare string) {
	silent, timeout := f >= stall, patience
	if silent {
		timeout = deadline
	}
	dbURL := newDatabase(t)
	p := newProxy(t, dbURL)
	w := newWorkload(newAPIWithPool(t, p.url, len(actions), prepare, Options{RequestTimeout: timeout}), 3*len(actions))
	w.fillPool() // connecting would take a part of the time
	suffer := func(op action) {
		c := w.send(op, false)
		if reads := op.applied == ""; c.ok() != (reads && !silent) || c.slowest > timeout+promptly {
			t.Errorf("%s: status %d after %v", op.name, c.status, c.slowest)
		}
	}
	if silent {
		p.times(int64(len(actions)), f)
		together(len(actions), func(i int) { suffer(actions[i]) })
	} else {
		for _, op := range actions {
			p.times(1, f)
			suffer(op)
		}
	}
	if n := p.counts[f].Load(); n != int64(len(actions)) {
		t.Errorf("%d operations have met the fault, not %d", n, len(actions))
	}
	// Nothing is wrong with the pool.
	for _, op := range slices.Concat(actions, actions) {
		if c := w.send(op, false); !c.ok() {
			t.Errorf("%s after the fault: status %d", op.name, c.status)
		}
	}
	w.server.Close()
	w.db.Close()
	p.wait()
	for i, times := range w.audit(dbURL) {
		// A late statement may yet meet the request to cancel it.
		if c := w.calls[i]; c.status == 503 && c.applied != "" && f != late && (times == 1) != f.executed() {
			t.Errorf("%s: the fault is not what it should be: applied %d times", c.name, times)
		}
	}
}

// Creations that share a statement are not run again when its reply is lost.
func TestFaultBatch(t *testing.T) {
	t.Parallel()
	for _, f := range []fault{cutWithin, cutAfter, resetAfter} {
		p := newProxy(t, newDatabase(t))
		a := newAPIWithPool(t, p.url, 4, "true", Options{})
		a.log.expected.Store(true)
		a.fillPool()
		p.times(100, f)
		together(60, func(int) { a.want503(a.do("POST", "/api/tasks", `{"title": "a"}`)) })
		if n := p.counts[f].Load(); n >= 60 {
			t.Errorf("%s: %d statements for 60 creations", f, n)
		}
	}
}

// Connections that a middlebox has forgotten while they were idle are reset when
// they are used. That costs reads nothing, and one write a 503.
func TestFaultForgotten(t *testing.T) {
	t.Parallel()
	inBothModes(t, func(t *testing.T, prepare string) {
		p := newProxy(t, newDatabase(t))
		a := newAPIWithPool(t, p.url, 5, prepare, Options{})
		id := a.create(`{"title": "a"}`).ID
		for _, path := range []string{"/api/tasks", "/api/tasks/" + id} {
			a.fillPool()
			p.age.Add(1)
			for range 5 {
				a.expect("200", "GET", path, "")
			}
		}
		a.fillPool()
		p.age.Add(1)
		a.log.expected.Store(true)
		for _, want := range []string{"503", "200", "200"} {
			a.expect(want, "PATCH", "/api/tasks/"+id, `{"title": "b"}`)
		}
	})
}

// A slow read that is ended with its connection is not run again.
func TestFaultSlowRead(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{RequestTimeout: patience})
	a.log.expected.Store(true)
	unlock := lockTasks(t, a.dbURL, lockTable)
	status := make(chan int, 1)
	go func() { status <- a.do("GET", "/api/tasks", "").StatusCode }()
	waitFor(t, "the statement to wait", func() bool { return waiting(t, a.dbURL) == 1 })
	execSQL(t, a.dbURL, fmt.Sprintf("SELECT pg_sleep(%v)", lostTime.Seconds()))
	execSQL(t, a.dbURL, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'")
	unlock()
	if got := <-status; got != http.StatusServiceUnavailable {
		t.Errorf("status %d", got)
	}
}

// Faults at random under load. The tasks of each request are its own, so that
// what became of it can be told; two more are everybody's.
func TestFaultWorkload(t *testing.T) {
	t.Parallel()
	inBothModes(t, testFaultWorkload)
}

func testFaultWorkload(t *testing.T, prepare string) {
	dbURL := newDatabase(t)
	p := newProxy(t, dbURL)
	w := newWorkload(newAPIWithPool(t, p.url, 8, prepare, Options{RequestTimeout: deadline}), 400)
	shared := w.newTasks(2)
	var met atomic.Int64
	p.do(func(bool) fault {
		if p.intN(4) > 0 {
			return pass
		}
		// In turn, so that each occurs; more seldom those that take their time.
		n := met.Add(1)
		if n%20 == 0 {
			return stall + fault(n/20)%(faults-stall)
		}
		return cutBefore + fault(n)%(stall-cutBefore)
	})
	var mu sync.Mutex
	flips, unknown := map[string][]Task{}, map[string]int{} // of shared tasks
	together(10, func(int) {
		for range 40 {
			w.send(actions[p.intN(len(actions))], true)
			id := shared[p.intN(len(shared))]
			got := w.do("PATCH", "/api/tasks/"+id+"/complete", "")
			mu.Lock()
			if got.StatusCode == http.StatusOK {
				flips[id] = append(flips[id], w.task(got))
			} else {
				w.want503(got)
				unknown[id]++
			}
			mu.Unlock()
		}
	})
	for f := range faults {
		if p.counts[f].Load() == 0 {
			t.Errorf("no statement has met %v", f)
		}
	}
	w.server.Close()
	w.db.Close()
	p.wait()
	w.audit(dbURL)
	db := open(t, dbURL)
	defer db.Close()
	for _, id := range shared {
		last, err := NewStore(db).Get(t.Context(), Target{ID: id})
		if err != nil {
			t.Fatal(err)
		}
		versions := map[int64]bool{}
		for _, flip := range append(flips[id], last) {
			if flip.Completed != (flip.Version%2 == 0) || flip.Version > last.Version {
				t.Errorf("after %d flips the task was %+v, and in the end %+v", flip.Version-1, flip, last)
			}
			versions[flip.Version] = true
		}
		times, known := int(last.Version)-1, len(flips[id])
		if len(versions) < known || times < known || times > known+unknown[id] {
			t.Errorf("%d flips succeeded, giving %d versions, the outcome of %d is unknown, there were %d", known, len(versions), unknown[id], times)
		}
	}
}

// A client that repeats its POST until it gets a 201 has one task, though half of
// all statements are lost.
func TestFaultIdempotencyKey(t *testing.T) {
	t.Parallel()
	const rounds, n = 5, 20
	dbURL := newDatabase(t)
	p := newProxy(t, dbURL)
	w := newAPIOn(t, p.url, Options{RequestTimeout: patience})
	w.log.expected.Store(true)
	p.do(func(bool) fault { return max(pass, fault(p.intN(2*int(stall)))-stall) })
	for round := range rounds {
		var made atomic.Int64
		ids := make([]string, n)
		together(n, func(i int) {
			for tries := 0; ids[i] == "" && tries < 100; tries++ {
				got := w.do("POST", "/api/tasks", `{"title": "x"}`, "Idempotency-Key", strconv.Itoa(round))
				if got.StatusCode == http.StatusServiceUnavailable {
					continue
				}
				ids[i] = w.task(w.want(http.StatusCreated, got)).ID
				if got.Header.Get("Idempotency-Replayed") == "" {
					made.Add(1)
				}
			}
		})
		if slices.Sort(ids); ids[0] == "" || ids[0] != ids[n-1] || made.Load() > 1 {
			t.Errorf("%d answers were not replayed, the tasks are %q", made.Load(), slices.Compact(ids))
		}
	}
	if n := queryInt(t, dbURL, "SELECT count(*) FROM tasks"); n != rounds {
		t.Errorf("%d tasks of %d keys", n, rounds)
	}
}

// shortTempDir returns a directory whose path is short enough for a socket's and
// where also the account may write that runs PostgreSQL for root.
func shortTempDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "tasks-fault-")
	if err := errors.Join(err, os.Chmod(dir, 0o777)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// newServer returns a PostgreSQL of the test's own.
func newServer(t testing.TB, opts ...string) *localDB {
	t.Helper()
	server, err := startLocalDB(t.Context(), shortTempDir(t), os.Getenv("PG_BIN"), append(opts, "fsync=off")...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := server.Stop(); err != nil {
			t.Error(err)
		}
	})
	return server
}

// newTCPServer returns a PostgreSQL of the test's own that listens on 127.0.0.1, as
// addr has it, and on ::1.
func newTCPServer(t testing.TB, opts ...string) (server *localDB, addr *net.TCPAddr) {
	t.Helper()
	addr = freeAddr(t)
	return newServer(t, append(opts, "listen_addresses=127.0.0.1,::1", fmt.Sprint("port=", addr.Port))...), addr
}

// freeAddr returns an address of 127.0.0.1 where nothing listens, with a port that
// no system gives to clients.
func freeAddr(t testing.TB) *net.TCPAddr {
	for {
		listener, err := net.Listen("tcp", fmt.Sprint("127.0.0.1:", 20_000+rand.IntN(10_000)))
		if err == nil {
			listener.Close()
			return listener.Addr().(*net.TCPAddr)
		}
	}
}

// newPooler returns a PgBouncer of the test's own that has two connections to each
// database and lends them for a transaction: the directory of its socket, and its
// address. databases is the section of its settings.
func newPooler(t testing.TB, databases, auth string) (dir string, addr *net.TCPAddr) {
	t.Helper()
	program, err := exec.LookPath("pgbouncer")
	if err != nil {
		program = "/usr/sbin/pgbouncer" // Debian's, not in everybody's PATH
	}
	dir, addr = shortTempDir(t), freeAddr(t)
	file, users := filepath.Join(dir, "pgbouncer.ini"), filepath.Join(dir, "users")
	if err := errors.Join(os.WriteFile(users, []byte(`"alice" "s3cret"`), 0o644), os.WriteFile(file, fmt.Appendf(nil, `[databases]
%s
[pgbouncer]
pool_mode = transaction
default_pool_size = 2
max_client_conn = 1000
auth_type = %s
auth_file = %s
listen_addr = 127.0.0.1
listen_port = %d
unix_socket_dir = %s
`, databases, auth, users, addr.Port, dir), 0o644)); err != nil {
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
	waitFor(t, "PgBouncer to listen", func() bool {
		conn, err := net.Dial("unix", fmt.Sprintf("%s/.s.PGSQL.%d", dir, addr.Port))
		if err == nil {
			conn.Close()
		}
		return err == nil
	})
	return dir, addr
}

// serverOf returns the part of a database's URL that names the server and the user.
func serverOf(dbURL string) string {
	return regexp.MustCompile(`host=\S+ port=\S+ user=\S+`).FindString(dbURL)
}

// pooled returns the URL of the same database through a pooler. newAPI calls it
// when TASKS_TEST_POOLER is 1.
func pooled(t testing.TB, dbURL string) string {
	t.Helper()
	dir, addr := newPooler(t, "* = "+serverOf(dbURL), "any")
	return strings.Replace(onTCP(dbURL, addr), "host=127.0.0.1", "host="+dir, 1)
}

// pgCtl runs PostgreSQL's program pg_ctl on a server, and waits for what it does.
func pgCtl(t testing.TB, server *localDB, args ...string) {
	t.Helper()
	if err := server.run(t.Context(), server.bin+"/pg_ctl", append(args, "-w", "-D", "data", "-l", "server.log")...); err != nil {
		t.Fatal(err)
	}
}

// freeze stops all processes of a server where they are, until thaw is called.
func freeze(t testing.TB, server *localDB) (thaw func()) {
	t.Helper()
	db := open(t, server.URL)
	defer db.Close()
	postmaster, err := strconv.Atoi(server.postmaster().pid)
	if err := errors.Join(err, db.Ping()); err != nil {
		t.Fatal(err)
	}
	frozen := []int{postmaster}
	thaw = sync.OnceFunc(func() {
		for _, pid := range frozen {
			syscall.Kill(pid, syscall.SIGCONT)
		}
	})
	t.Cleanup(thaw)
	// The one who would start new processes first, the one who tells of them last.
	syscall.Kill(postmaster, syscall.SIGSTOP)
	var pids []int64
	if err := db.QueryRow("SELECT array_agg(pid ORDER BY pid = pg_backend_pid()) FROM pg_stat_activity").Scan(pq.Array(&pids)); err != nil {
		t.Fatal(err)
	}
	for _, pid := range pids {
		frozen = append(frozen, int(pid))
		syscall.Kill(int(pid), syscall.SIGSTOP)
	}
	return thaw
}

// countGoroutines returns a function that counts the goroutines that the test
// has started since, and those that they have started, but none of other tests.
func countGoroutines(t testing.TB) func() int {
	pprof.SetGoroutineLabels(pprof.WithLabels(t.Context(), pprof.Labels("test", t.Name())))
	record := regexp.MustCompile(`(?m)^(\d+) @.*\n# labels: .*"` + regexp.QuoteMeta(t.Name()) + `"`)
	return func() (n int) {
		var profile strings.Builder
		pprof.Lookup("goroutine").WriteTo(&profile, 1)
		for _, match := range record.FindAllStringSubmatch(profile.String(), -1) {
			count, _ := strconv.Atoi(match[1])
			n += count
		}
		return n
	}
}

// fillPool opens all connections that the pool may have, and leaves them idle.
func (a *api) fillPool() {
	a.Helper()
	for range a.db.Stats().MaxOpenConnections {
		conn, err := a.db.Conn(a.Context())
		if err != nil {
			a.Fatal(err)
		}
		defer conn.Close()
	}
}

// connections returns how many the server has for the database of dbURL.
func connections(t testing.TB, dbURL string) int {
	return queryInt(t, dbURL, "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()")
}

// A database goes away and comes back in several ways, on one server of its own.
func TestFaultDatabaseAway(t *testing.T) {
	t.Parallel()
	// By TCP, where the first write to the other end that is gone still succeeds.
	server, addr := newTCPServer(t)
	execSQL(t, server.URL, "CREATE DATABASE away")
	dbURL := strings.Replace(onTCP(server.URL, addr), "dbname=postgres", "dbname=away", 1)
	goroutines := countGoroutines(t)
	const conns = 8
	w := newWorkload(newAPIWithPool(t, dbURL, conns, "true", Options{RequestTimeout: deadline}), 20_000)
	before := goroutines()

	restart := func() { pgCtl(t, server, "restart", "-m", "immediate") }
	terminate := func() {
		execSQL(t, server.URL, "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE datname = 'away'")
	}

	// Connections that die while they are idle cost no request anything.
	for i, kill := range []func(){restart, terminate, restart, terminate} {
		w.fillPool()
		kill()
		together(len(actions), func(j int) {
			if c := w.send(actions[j], false); !c.ok() {
				t.Errorf("%s after idle connections died (%d): status %d", c.name, i, c.status)
			}
		})
	}

	// Outages cost those requests an error that they meet, and no others.
	type period struct{ start, end time.Time }
	var outages []period
	// suffer sees that every request fails, and in time.
	suffer := func() {
		t.Helper()
		w.want(http.StatusOK, w.do("GET", "/healthz", ""))
		start := time.Now()
		w.want503(w.do("GET", "/readyz", ""))
		if took := time.Since(start); took > 3*time.Second {
			t.Errorf("/readyz took %v", took)
		}
		enough := w.failures.Load() + 20
		waitFor(t, "requests to fail", func() bool { return w.failures.Load() > enough })
	}
	stop := w.start(12, 10*time.Millisecond)
	for _, outage := range []func(){
		restart,
		terminate,
		func() { pgCtl(t, server, "stop", "-m", "fast"); suffer(); pgCtl(t, server, "restart") },
		func() { thaw := freeze(t, server); suffer(); thaw() },
	} {
		start := time.Now()
		outage()
		outages = append(outages, period{start, w.recovered()})
	}
	stop()
	for _, c := range w.calls {
		met := func(p period) bool { return c.start.Before(p.end) && c.end.After(p.start) }
		if !c.ok() && (!slices.ContainsFunc(outages, met) || c.slowest > deadline+promptly) {
			t.Errorf("%s failed, after %v, though the database was there, or too late: status %d", c.name, c.slowest, c.status)
		}
	}
	w.audit(dbURL)

	// Nothing is left behind.
	w.server.Client().CloseIdleConnections()
	waitFor(t, "goroutines to end", func() bool { return goroutines() <= before })
	waitFor(t, "connections to be closed", func() bool { return connections(t, dbURL) == w.db.Stats().OpenConnections })
	if stats := w.db.Stats(); stats.InUse > 0 || stats.OpenConnections > conns {
		t.Errorf("connections: %+v", stats)
	}
}

// Behind a pooler a statement's parameters never reach another statement.
func TestFaultPooler(t *testing.T) {
	t.Parallel()
	a := newAPIOn(t, pooled(t, newDatabase(t)), Options{RequestTimeout: patience})
	const clients, n = 8, 75
	deleted, read := a.newTasks(clients*n), a.newTasks(clients*n)
	together(2*clients, func(client int) {
		for i := client / 2 * n; i < (client/2+1)*n; i++ {
			if client%2 == 0 {
				a.want(http.StatusNoContent, a.do("DELETE", "/api/tasks/"+deleted[i], ""))
			} else if got := a.task(a.want(http.StatusOK, a.do("GET", "/api/tasks/"+read[i], ""))); got.ID != read[i] {
				t.Errorf("asked for %s, got %s", read[i], got.ID)
			}
		}
	})
	left := queryInt(t, a.dbURL, "SELECT count(*) FROM tasks WHERE id = ANY ($1::uuid[])", read)
	if all := queryInt(t, a.dbURL, "SELECT count(*) FROM tasks"); left != clients*n || all != left {
		t.Errorf("of %d tasks that were only read %d are left, of all %d", clients*n, left, all)
	}
}

// Services that start together behind a pooler do not get in each other's way.
func TestFaultPoolerMigration(t *testing.T) {
	t.Parallel()
	dbURL := newDatabase(t)
	url := pooled(t, dbURL)
	for range 5 {
		together(8, func(int) {
			db := open(t, url)
			defer db.Close()
			if err := NewStore(db).Migrate(t.Context()); err != nil {
				t.Error(err)
			}
		})
		execSQL(t, dbURL, "DROP TABLE tasks")
	}
}

// newStandby returns a synchronous standby of a primary, which commits nothing
// that its standby does not have. dir is for its files and its socket.
func newStandby(t testing.TB, primary *localDB, dir string) *localDB {
	t.Helper()
	pgCtlPath, err := filepath.EvalSymlinks(primary.bin + "/pg_ctl") // which may be all that is linked to
	cfg, cfgErr := parseURL(primary.URL)
	if err := errors.Join(err, cfgErr); err != nil {
		t.Fatal(err)
	}
	standby := &localDB{dir: dir, bin: filepath.Dir(pgCtlPath), URL: strings.Replace(primary.URL, cfg.Host, dir, 1)}
	if err := standby.run(t.Context(), standby.bin+"/pg_basebackup", "-R", "-c", "fast", "--no-sync", "-D", "data", "-d", primary.URL); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		standby.run(context.WithoutCancel(t.Context()), standby.bin+"/pg_ctl", "stop", "-m", "immediate", "-D", "data")
	})
	pgCtl(t, standby, "start", "-o", fmt.Sprintf("-c listen_addresses= -c port=%d -c unix_socket_directories=%s -c fsync=off", cfg.Port, dir))
	execSQL(t, primary.URL, "ALTER SYSTEM SET synchronous_standby_names = '*'")
	execSQL(t, primary.URL, "SELECT pg_reload_conf()")
	waitFor(t, "the standby to be synchronous", func() bool {
		return queryInt(t, primary.URL, "SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync'") == 1
	})
	return standby
}

// The service follows a failover by itself and has lost nothing, whether the old
// primary has died or fallen silent.
func TestFaultFailover(t *testing.T) {
	t.Parallel()
	first, secondDir, thirdDir := newServer(t), shortTempDir(t), shortTempDir(t)
	second := newStandby(t, first, secondDir)
	dbURL := strings.Replace(first.URL, " port=", ","+secondDir+","+thirdDir+" port=", 1) + " target_session_attrs=read-write"
	w := newWorkload(newAPIWithPool(t, dbURL, 6, "true", Options{RequestTimeout: 2 * time.Second}), 20_000)
	// What the standby does not have is not acknowledged, even if the primary says
	// after all that it has it.
	thaw := freeze(t, second)
	together(len(actions), func(i int) {
		if c := w.send(actions[i], false); c.applied != "" && c.ok() {
			t.Errorf("%s was acknowledged without the standby", c.name)
		}
	})
	thaw()
	stop := w.start(6, 10*time.Millisecond)
	pgCtl(t, first, "stop", "-m", "immediate")
	pgCtl(t, second, "promote")
	w.recovered()
	third := newStandby(t, second, thirdDir)
	freeze(t, second)
	pgCtl(t, third, "promote")
	w.recovered()
	stop()
	w.audit(third.URL)
}

// lockTasks makes all statements on tasks wait until unlock is called.
func lockTasks(t testing.TB, dbURL, lock string, args ...any) (unlock func()) {
	t.Helper()
	db := open(t, dbURL)
	tx, err := db.Begin()
	if err == nil {
		_, err = tx.Exec(lock, args...)
	}
	if err != nil {
		t.Fatal(err)
	}
	unlock = sync.OnceFunc(func() { tx.Rollback(); db.Close() })
	t.Cleanup(unlock)
	return unlock
}

const (
	lockTable = "LOCK TABLE tasks"
	lockRow   = "SELECT FROM tasks WHERE id = $1 FOR UPDATE"
)

// waiting returns how many statements on the database wait for a lock.
func waiting(t testing.TB, dbURL string) int {
	return queryInt(t, dbURL, "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'")
}

// Of ten times more requests than the service takes, those over its limit are
// refused while the others still wait, and all others succeed.
func TestFaultOverload(t *testing.T) {
	t.Parallel()
	const conns, inFlight, n = 2, 16, 160
	a := newAPIWithPool(t, newDatabase(t), conns, "false", Options{RequestTimeout: patience, MaxInFlight: inFlight})
	a.log.expected.Store(true)
	ids := a.newTasks(n)
	unlock := lockTasks(t, a.dbURL, lockTable)
	answers := make(chan *answer)
	for _, id := range ids {
		go func() { answers <- a.do("PATCH", "/api/tasks/"+id+"/complete", "") }()
	}
	for range n - inFlight {
		a.want503(<-answers)
	}
	if n := waiting(t, a.dbURL); n > conns {
		t.Errorf("%d statements on %d connections", n, conns)
	}
	a.want(http.StatusOK, a.do("GET", "/healthz", ""))
	unlock()
	for range inFlight {
		a.want(http.StatusOK, <-answers)
	}
	if done := queryInt(t, a.dbURL, "SELECT count(*) FROM tasks WHERE completed AND version = 2"); done != inFlight {
		t.Errorf("%d tasks changed, not %d", done, inFlight)
	}
}

// Under lasting overload requests are served in the order of their coming, more
// or less, so that none is late because of others that came after it.
func TestFaultOverloadOrder(t *testing.T) {
	t.Parallel()
	const conns, clients, n = 2, 64, 10
	a := newAPIWithPool(t, newDatabase(t), conns, "false", Options{RequestTimeout: patience})
	execSQL(t, a.dbURL, `CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(0.005); RETURN NEW; END'`)
	execSQL(t, a.dbURL, "CREATE TRIGGER slow BEFORE UPDATE ON tasks FOR EACH ROW EXECUTE FUNCTION slow()")
	var clock atomic.Int64
	ids, spans := a.newTasks(clients*n), make([]struct{ start, end int64 }, clients*n)
	together(clients, func(client int) {
		for i := client * n; i < (client+1)*n; i++ {
			spans[i].start = clock.Add(1)
			a.want(http.StatusOK, a.do("PATCH", "/api/tasks/"+ids[i]+"/complete", ""))
			spans[i].end = clock.Add(1)
		}
	})
	for _, s := range spans {
		overtaking := 0
		for _, other := range spans {
			if other.start > s.start && other.end < s.end {
				overtaking++
			}
		}
		if overtaking > 2*clients {
			t.Errorf("a request was overtaken by %d others", overtaking)
		}
	}
}

// sendRaw sends the beginning of a request by hand.
func (a *api) sendRaw(text string) *rawConn {
	a.Helper()
	c := a.dial()
	c.send(text)
	return c
}

// Clients who send or read slowly hold neither a connection to the database nor,
// as long as they send, a place among the requests in flight.
func TestFaultSlowClients(t *testing.T) {
	t.Parallel()
	const inFlight, slow = 2, 20
	a := newAPIWithPool(t, newDatabase(t), 1, "false", Options{RequestTimeout: patience, MaxInFlight: inFlight})
	execSQL(t, a.dbURL, `INSERT INTO tasks (id, title, description)
		SELECT `+idOf("n")+`, 'x', repeat('x', 10000) FROM generate_series(1, 1000) n`)
	var senders []*rawConn
	for range slow {
		senders = append(senders, a.sendRaw("POST /api/tasks HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 19\r\n\r\n{\"title\": "))
	}
	// More than any socket's buffers hold.
	reader := a.sendRaw("GET /api/tasks?limit=1000 HTTP/1.1\r\nHost: x\r\n\r\n")
	if _, err := reader.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	for range 5 {
		a.create(`{"title": "quick"}`)
	}
	if n := a.db.Stats().InUse; n != 0 {
		t.Errorf("%d connections are in use", n)
	}
	reader.Close()
	for _, sender := range senders {
		sender.send(`"slowly"}`)
		if got := sender.answer("POST"); got.StatusCode != http.StatusCreated {
			t.Errorf("a slow sender got %s", got.Status)
		}
	}
}

// A client that goes away ends its statement, which frees its connection, or its
// waiting for one.
func TestFaultClientGone(t *testing.T) {
	t.Parallel()
	a := newAPIWithPool(t, newDatabase(t), 1, "false", Options{RequestTimeout: patience})
	id := a.newTasks(1)[0]
	inFlight := func(n int) {
		want := fmt.Sprintf("in_flight %d\n", n)
		waitFor(t, want, func() bool { return strings.Contains(string(a.do("GET", "/metrics", "").body), want) })
	}
	for name, request := range map[string]string{
		"without a body":                 "PATCH /api/tasks/" + id + "/complete HTTP/1.1\r\nHost: x\r\n\r\n",
		"with a body":                    "PUT /api/tasks/" + id + " HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 14\r\n\r\n{\"title\": \"x\"}",
		"with a body that means nothing": "DELETE /api/tasks/" + id + " HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}",
	} {
		unlock := lockTasks(t, a.dbURL, lockRow, id)
		executing := a.sendRaw(request)
		waitFor(t, "the statement to wait", func() bool { return waiting(t, a.dbURL) == 1 })
		queued := a.sendRaw(request)
		inFlight(3)
		queued.Close()
		inFlight(2)
		executing.Close()
		waitFor(t, "the statement to end", func() bool { return waiting(t, a.dbURL) == 0 && a.db.Stats().InUse == 0 })
		unlock()
		if got := a.task(a.want(http.StatusOK, a.do("GET", "/api/tasks/"+id, ""))); got.Version != 1 {
			t.Errorf("%s: a statement that was cancelled has had effect: %+v", name, got)
		}
	}
}

// The request to cancel a statement may be slow. It does not meet the statement
// of another client instead.
func TestFaultLateCancel(t *testing.T) {
	t.Parallel()
	inBothModes(t, func(t *testing.T, prepare string) {
		dbURL := newDatabase(t)
		p := newProxy(t, dbURL)
		a := newAPIWithPool(t, p.url, 1, prepare, Options{RequestTimeout: patience})
		path := "/api/tasks/" + a.newTasks(1)[0]
		a.want(http.StatusOK, a.do("GET", path, "")) // is prepared now
		p.cancel.Lock()
		unlock := lockTasks(t, dbURL, lockTable)
		gone := a.sendRaw("GET " + path + " HTTP/1.1\r\nHost: x\r\n\r\n")
		waitFor(t, "the statement to wait", func() bool { return waiting(t, dbURL) == 1 })
		gone.Close()
		waitFor(t, "the request to be cancelled", func() bool { return p.cancels.Load() == 1 })
		unlock()
		unlock = lockTasks(t, dbURL, lockTable)
		status := make(chan int)
		go func() { status <- a.do("GET", path, "").StatusCode }()
		waitFor(t, "the next statement to wait", func() bool { return waiting(t, dbURL) == 1 })
		p.cancel.Unlock()
		waitFor(t, "the server to have done it", func() bool { return p.cancels.Load() == 0 })
		unlock()
		if got := <-status; got != http.StatusOK {
			t.Errorf("the statement of another client was cancelled: status %d", got)
		}
	})
}

// An error of the server's own limits is a 503, and has no effect once it has
// passed.
func TestFaultServerLimits(t *testing.T) {
	t.Parallel()
	dbURL := newDatabase(t)
	owner := newAPIOn(t, dbURL, Options{})
	roleURL, role := newRole(t, dbURL)
	execSQL(t, dbURL, "GRANT SELECT, INSERT, UPDATE, DELETE ON tasks TO "+role)
	a := newAPIOn(t, roleURL, Options{RequestTimeout: patience})
	a.log.expected.Store(true)
	path := "/api/tasks/" + owner.newTasks(1)[0] + "/complete"
	alter := func(what string) {
		execSQL(t, testServer.URL, "ALTER "+strings.NewReplacer("ROLE", "ROLE "+role, "DATABASE", "DATABASE "+strings.TrimPrefix(role, "role_of_")).Replace(what))
		execSQL(t, testServer.URL, "SELECT pg_terminate_backend(pid, 30000) FROM pg_stat_activity WHERE usename = $1", role)
	}
	for i, limit := range [][2]string{
		{"ROLE SET default_transaction_read_only = on", "ROLE RESET default_transaction_read_only"},
		{"ROLE SET statement_timeout = '50ms'", "ROLE RESET statement_timeout"},
		{"ROLE SET lock_timeout = '50ms'", "ROLE RESET lock_timeout"},
		{"ROLE CONNECTION LIMIT 0", "ROLE CONNECTION LIMIT -1"},
		{"DATABASE ALLOW_CONNECTIONS false", "DATABASE ALLOW_CONNECTIONS true"},
	} {
		unlock := lockTasks(t, dbURL, "LOCK TABLE tasks IN EXCLUSIVE MODE")
		alter(limit[0])
		a.want503(a.do("PATCH", path, ""))
		if i > 2 {
			a.want503(a.do("GET", "/readyz", ""))
		}
		unlock()
		alter(limit[1])
		a.want(http.StatusOK, a.do("GET", "/readyz", ""))
		if got := a.task(a.want(http.StatusOK, a.do("PATCH", path, ""))); got.Version != int64(i+2) {
			t.Errorf("%s: version %d, want %d", limit[0], got.Version, i+2)
		}
	}
}

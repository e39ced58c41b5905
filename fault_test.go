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
)

// waitFor returns once done does, which is asked again and again.
func waitFor(t testing.TB, what string, done func() bool) {
	t.Helper()
	for start := time.Now(); !done(); time.Sleep(5 * time.Millisecond) {
		if time.Since(start) > patience {
			t.Fatalf("waited in vain: %s", what)
		}
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
func newAPIWithPool(t testing.TB, dbURL string, conns int, prepare prepareMode, opts Options) *api {
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
	if contentType := got.Header.Get("Content-Type"); contentType != "application/problem+json" || got.Header.Get("Retry-After") == "" {
		a.Errorf("503 with Content-Type %q, Retry-After %q", contentType, got.Header.Get("Retry-After"))
	}
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
	url     string // of the database, through the proxy
	socket  string
	conns   sync.WaitGroup
	fate    atomic.Pointer[func(executes bool) fault] // asked for each statement; nil: pass
	counts  [faults]atomic.Int64                      // statements by what was done to them
	mu      sync.Mutex                                // guards chance
	chance  *rand.Rand
	cancels atomic.Int64 // requests to cancel a statement that are under way
	cancel  sync.RWMutex // held for reading by each request to cancel a statement
}

// newProxy returns a proxy to the database that dbURL names.
func newProxy(t testing.TB, dbURL string) *proxy {
	t.Helper()
	cfg, err := pq.NewConfig(dbURL)
	if err != nil {
		t.Fatal(err)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	p := &proxy{
		TB:     t,
		chance: rand.New(rand.NewPCG(seed, 0)),
		url:    fmt.Sprintf("host=127.0.0.1 port=%d user=%s dbname=%s sslmode=disable", listener.Addr().(*net.TCPAddr).Port, cfg.User, cfg.Database),
		socket: fmt.Sprintf("%s/.s.PGSQL.%d", cfg.Host, cfg.Port),
	}
	go func() {
		for {
			client, err := listener.Accept()
			if err != nil {
				return
			}
			p.conns.Go(func() { p.serve(client.(*net.TCPConn)) })
		}
	}()
	return p
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
	defer client.Close()
	server, err := net.Dial("unix", p.socket)
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
	greeting, err := messages(fromServer, "Z")
	client.Write(greeting)
	for err == nil {
		var statement, reply []byte
		if statement, err = messages(fromClient, "QSX"); err != nil {
			return
		}
		f := pass
		if fate := p.fate.Load(); fate != nil && statement[0] != 'X' {
			f = (*fate)(executes(statement))
		}
		p.counts[f].Add(1)
		switch f {
		case resetBefore:
			client.SetLinger(0)
			return
		case cutBefore:
			return
		case late:
			io.Copy(io.Discard, fromClient)
		}
		server.Write(statement)
		reply, err = messages(fromServer, "Z")
		switch f {
		case cutWithin:
			client.Write(reply[:p.intN(len(reply))])
			return
		case resetAfter:
			client.SetLinger(0)
			return
		case cutAfter:
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

// action is an operation of the API. In path, body and key %[1]s is the id of
// a task and %[2]s a text that no other request has.
type action struct {
	name, method, path, body, key string
	success                       int
	applied                       func(got Task, text string) bool // nil: of a read
}

var (
	opCreate = action{"create", "POST", "/api/tasks", `{"title": "%[2]s"}`, "", 201,
		func(got Task, text string) bool { return got.Title == text }}
	opCreateWithKey = action{"create with a key", "POST", "/api/tasks", `{"title": "%[2]s"}`, "key-%[2]s", 201,
		func(got Task, text string) bool { return got.Title == text }}
	opReplace = action{"replace", "PUT", "/api/tasks/%[1]s", `{"title": "%[2]s", "completed": true}`, "", 200,
		func(got Task, text string) bool { return got.Title == text && got.Completed }}
	opPatch = action{"patch", "PATCH", "/api/tasks/%[1]s", `{"title": "%[2]s"}`, "", 200,
		func(got Task, text string) bool { return got.Title == text && !got.Completed }}
	opFlip = action{"flip", "PATCH", "/api/tasks/%[1]s/complete", "", "", 200,
		func(got Task, text string) bool { return got.Title == "old" && got.Completed }}
	opSet = action{"set", "PATCH", "/api/tasks/%[1]s/complete", `{"completed": true}`, "", 200,
		func(got Task, text string) bool { return got.Title == "old" && got.Completed }}
	opDelete = action{"delete", "DELETE", "/api/tasks/%[1]s", "", "", 204,
		func(got Task, text string) bool { return false }}
	opGet  = action{"get", "GET", "/api/tasks/%[1]s", "", "", 200, nil}
	opList = action{"list", "GET", "/api/tasks?limit=3", "", "", 200, nil}

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
	fill := func(format string) string { return strings.NewReplacer("%[1]s", c.id, "%[2]s", c.text).Replace(format) }
	var headers []string
	if op.key != "" {
		headers = []string{"Idempotency-Key", fill(op.key)}
	}
	for {
		asked := time.Now()
		got := w.do(op.method, fill(op.path), fill(op.body), headers...)
		c.status, c.end = got.StatusCode, time.Now()
		c.slowest = max(c.slowest, c.end.Sub(asked))
		if c.status == op.success {
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
	stop = func() {
		done.Store(true)
		running.Wait()
	}
	w.Cleanup(stop)
	return stop
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
	rows, err := db.Query("SELECT id, title, completed, version FROM tasks")
	if err != nil {
		w.Fatal(err)
	}
	defer rows.Close()
	byID, byTitle := map[string]Task{}, map[string][]Task{}
	for rows.Next() {
		var t Task
		if err := rows.Scan(&t.ID, &t.Title, &t.Completed, &t.Version); err != nil {
			w.Fatal(err)
		}
		byID[t.ID] = t
		byTitle[t.Title] = append(byTitle[t.Title], t)
	}
	if err := rows.Err(); err != nil {
		w.Fatal(err)
	}
	succeeded := map[string]int{}
	for _, c := range w.calls {
		if c.status == c.success {
			succeeded[c.name]++
		}
		got, there := byID[c.id]
		times := int(got.Version) - 1
		switch c.name {
		case opDelete.name:
			times = 1
			if there {
				times = 0
			}
		case opCreate.name, opCreateWithKey.name:
			times = len(byTitle[c.text])
			if times > 0 {
				got = byTitle[c.text][0]
			}
		default:
			if !there {
				w.Errorf("%s %s: the task is gone", c.name, c.id)
			}
		}
		switch {
		case c.applied == nil && times != 0, times > 1, times == 0 && c.applied != nil && c.status == c.success:
			w.Errorf("%s %s: answered with %d, applied %d times", c.name, c.id, c.status, times)
		case times == 1 && there != (c.name != opDelete.name),
			times == 1 && c.name != opDelete.name && !c.applied(got, c.text):
			w.Errorf("%s %s %q: applied as %+v", c.name, c.id, c.text, got)
		}
		applied = append(applied, times)
	}
	w.Logf("%d requests; succeeded: %v", len(w.calls), succeeded)
	return applied
}

// Each operation suffers each fault once.
func TestFaultEachOperation(t *testing.T) {
	t.Parallel()
	for n := range 2 * (faults - 1) {
		f, prepare := 1+n/2, prepareAlways+prepareMode(n%2)
		t.Run(fmt.Sprintf("%v,prepare=%v", f, prepare == prepareAlways), func(t *testing.T) {
			t.Parallel()
			silent, timeout := f >= stall, patience
			if silent {
				timeout = time.Second
			}
			dbURL := newDatabase(t)
			p := newProxy(t, dbURL)
			w := newWorkload(newAPIWithPool(t, p.url, len(actions), prepare, Options{RequestTimeout: timeout}), 3*len(actions))
			suffer := func(op action) {
				c := w.send(op, false)
				ok := c.status == op.success
				if ok && (silent || op.applied != nil) {
					t.Errorf("%s: status %d", op.name, c.status)
				}
				if c.slowest > timeout+promptly {
					t.Errorf("%s: answered after %v", op.name, c.slowest)
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
				if c := w.send(op, false); c.status != op.success {
					t.Errorf("%s after the fault: status %d", op.name, c.status)
				}
			}
			w.server.Close()
			w.db.Close()
			p.conns.Wait() // for the late ones
			for i, times := range w.audit(dbURL) {
				// A late statement may yet meet the request to cancel it.
				if c := w.calls[i]; c.status == 503 && c.applied != nil && f != late && (times == 1) != f.executed() {
					t.Errorf("%s: the fault is not what it should be: applied %d times", c.name, times)
				}
			}
		})
	}
}

// Faults at random under load. The tasks of each request are its own, so that
// what became of it can be told; two more are everybody's.
func TestFaultWorkload(t *testing.T) {
	t.Parallel()
	for _, prepare := range []prepareMode{prepareNever, prepareAlways} {
		t.Run(fmt.Sprintf("prepare=%v", prepare == prepareAlways), func(t *testing.T) {
			t.Parallel()
			testFaultWorkload(t, prepare)
		})
	}
}

func testFaultWorkload(t *testing.T, prepare prepareMode) {
	dbURL := newDatabase(t)
	p := newProxy(t, dbURL)
	w := newWorkload(newAPIWithPool(t, p.url, 8, prepare, Options{RequestTimeout: time.Second}), 400)
	shared := w.newTasks(2)
	var met atomic.Int64
	p.do(func(bool) fault {
		if p.intN(4) > 0 {
			return pass
		}
		// In turn, so that each occurs; more seldom those that take their time.
		n := met.Add(1)
		if n%10 == 0 {
			return stall + fault(n/10)%(faults-stall)
		}
		return cutBefore + fault(n)%(stall-cutBefore)
	})
	var mu sync.Mutex
	flips, unknown := map[string][]Task{}, map[string]int{} // of shared tasks
	var clients sync.WaitGroup
	for range 10 {
		clients.Go(func() {
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
	}
	clients.Wait()
	for f := range faults {
		if p.counts[f].Load() == 0 {
			t.Errorf("no statement has met %v", f)
		}
	}
	w.server.Close()
	w.db.Close()
	p.conns.Wait()
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

// A client that repeats its POST until it gets a 201 has one task.
func TestFaultIdempotencyKey(t *testing.T) {
	t.Parallel()
	for _, broken := range []bool{false, true} {
		t.Run(fmt.Sprintf("broken=%v", broken), func(t *testing.T) {
			t.Parallel()
			const rounds, n = 5, 20
			dbURL := newDatabase(t)
			p := newProxy(t, dbURL)
			w := newAPIOn(t, p.url, Options{RequestTimeout: patience})
			if broken {
				w.log.expected.Store(true)
				p.do(func(bool) fault { return max(pass, fault(p.intN(2*int(stall)))-stall) }) // half of them
			}
			for round := range rounds {
				var clients sync.WaitGroup
				var made atomic.Int64
				ids := make(chan string, n)
				for range n {
					clients.Go(func() {
						for range 100 {
							got := w.do("POST", "/api/tasks", `{"title": "x"}`, "Idempotency-Key", strconv.Itoa(round))
							if got.StatusCode == http.StatusServiceUnavailable && broken {
								continue
							}
							w.want(http.StatusCreated, got)
							ids <- w.task(got).ID
							if got.Header.Get("Idempotency-Replayed") == "" {
								made.Add(1)
							}
							return
						}
					})
				}
				clients.Wait()
				close(ids)
				id, answers := <-ids, 1
				for other := range ids {
					answers++
					if other != id {
						t.Errorf("two tasks of one key, %s and %s", id, other)
					}
				}
				if answers != n || made.Load() > 1 || made.Load() == 0 && !broken {
					t.Errorf("%d answers, %d of them not replayed", answers, made.Load())
				}
			}
			if n := queryInt(t, dbURL, "SELECT count(*) FROM tasks"); n != rounds {
				t.Errorf("%d tasks of %d keys", n, rounds)
			}
		})
	}
}

// shortTempDir returns a directory whose path is short enough for a socket's and
// where also the account may write that runs PostgreSQL for root.
func shortTempDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "tasks-fault-")
	if err == nil {
		err = os.Chmod(dir, 0o777)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// newServer returns a PostgreSQL of the test's own.
func newServer(t testing.TB, opts ...string) *localDB {
	t.Helper()
	dir := shortTempDir(t)
	server, err := startLocalDB(t.Context(), dir, os.Getenv("PG_BIN"), append(opts, "fsync=off")...)
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
	signal := func(pid string, s syscall.Signal) {
		if pid, err := strconv.Atoi(pid); err == nil {
			syscall.Kill(pid, s)
		}
	}
	text, readErr := os.ReadFile(filepath.Join(server.dir, "data", "postmaster.pid"))
	postmaster, _, _ := strings.Cut(string(text), "\n")
	frozen := []string{postmaster}
	thaw = sync.OnceFunc(func() {
		for _, pid := range frozen {
			signal(pid, syscall.SIGCONT)
		}
	})
	t.Cleanup(thaw)
	// The one who would start new processes first, the one who tells of them last.
	err := db.Ping()
	signal(postmaster, syscall.SIGSTOP)
	rows, queryErr := db.Query("SELECT pid FROM pg_stat_activity ORDER BY pid = pg_backend_pid()")
	if err := errors.Join(readErr, err, queryErr); err != nil {
		t.Fatal(err)
	}
	defer rows.Close()
	for rows.Next() {
		var pid string
		if err := rows.Scan(&pid); err != nil {
			t.Fatal(err)
		}
		frozen = append(frozen, pid)
	}
	for _, pid := range frozen {
		signal(pid, syscall.SIGSTOP)
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
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := listener.Addr().(*net.TCPAddr).Port
	listener.Close()
	server := newServer(t, "listen_addresses=127.0.0.1", fmt.Sprintf("port=%d", port))
	execSQL(t, server.URL, "CREATE DATABASE away")
	dbURL := fmt.Sprintf("host=127.0.0.1 port=%d user=postgres dbname=away sslmode=disable", port)
	goroutines := countGoroutines(t)
	const conns, timeout = 8, time.Second
	w := newWorkload(newAPIWithPool(t, dbURL, conns, prepareAlways, Options{RequestTimeout: timeout}), 20_000)
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
			if c := w.send(actions[j], false); c.status != c.success {
				t.Errorf("%s after idle connections died (%d): status %d", c.name, i, c.status)
			}
		})
	}

	// Outages cost those requests an error that they meet, and no others.
	type period struct{ start, end time.Time }
	var outages []period
	// Nobody gets anything but failures, and those in time.
	suffer := func() {
		t.Helper()
		w.want(http.StatusOK, w.do("GET", "/healthz", ""))
		start := time.Now()
		w.want503(w.do("GET", "/readyz", ""))
		if took := time.Since(start); took > readyTimeout+promptly {
			t.Errorf("/readyz took %v", took)
		}
		enough := w.failures.Load() + 30
		waitFor(t, "requests to fail", func() bool { return w.failures.Load() > enough })
	}
	stop := w.start(12, 10*time.Millisecond)
	for _, outage := range []func(){
		restart,
		terminate,
		func() {
			pgCtl(t, server, "stop", "-m", "fast")
			suffer()
			pgCtl(t, server, "restart")
		},
		func() {
			thaw := freeze(t, server)
			suffer()
			thaw()
		},
	} {
		start := time.Now()
		outage()
		waitFor(t, "the service to be ready", func() bool { return w.do("GET", "/readyz", "").StatusCode == http.StatusOK })
		outages = append(outages, period{start, time.Now()})
		enough := w.used.Load() + 200
		waitFor(t, "requests to go on", func() bool { return w.used.Load() > enough })
	}
	stop()
	for _, c := range w.calls {
		if c.status == c.success {
			continue
		}
		if !slices.ContainsFunc(outages, func(p period) bool { return c.start.Before(p.end) && c.end.After(p.start) }) {
			t.Errorf("%s failed while the database was there: status %d", c.name, c.status)
		}
		if c.slowest > timeout+promptly {
			t.Errorf("%s was answered after %v", c.name, c.slowest)
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

// pooled returns the URL of the same database through a PgBouncer of the test's
// own, which has two connections to the server and lends them for a transaction.
// newAPI calls it when TASKS_TEST_POOLER is 1.
func pooled(t testing.TB, dbURL string) string {
	t.Helper()
	program, err := exec.LookPath("pgbouncer")
	if err != nil {
		program, err = exec.LookPath("/usr/sbin/pgbouncer") // Debian's, not in everybody's PATH
	}
	if err != nil {
		t.Fatal("PgBouncer is missing: apt-get install pgbouncer (or brew install pgbouncer)")
	}
	cfg, err := pq.NewConfig(dbURL)
	if err != nil {
		t.Fatal(err)
	}
	dir := shortTempDir(t)
	file := filepath.Join(dir, "pgbouncer.ini")
	settings := fmt.Sprintf(`
		[databases]
		* = host=%s port=%d user=%s
		[pgbouncer]
		pool_mode = transaction
		default_pool_size = 2
		max_client_conn = 1000
		auth_type = any
		unix_socket_dir = %s
		listen_port = 6432
		log_connections = 0
		log_disconnections = 0
		`, cfg.Host, cfg.Port, cfg.User, dir)
	if err := os.WriteFile(file, []byte(strings.ReplaceAll(settings, "\t", "")), 0o644); err != nil {
		t.Fatal(err)
	}
	var log strings.Builder
	pooler := exec.Command(program, file)
	if os.Geteuid() == 0 {
		pooler = exec.Command(program, "-u", localAccount, file)
	}
	pooler.Stderr = &log
	if err := pooler.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		pooler.Process.Kill()
		pooler.Wait()
		if t.Failed() {
			t.Logf("PgBouncer's log:\n%s", &log)
		}
	})
	url := fmt.Sprintf("host=%s port=6432 user=%s dbname=%s sslmode=disable", dir, cfg.User, cfg.Database)
	db := open(t, url)
	defer db.Close()
	waitFor(t, "PgBouncer to be ready", func() bool { return db.Ping() == nil })
	return url
}

// Behind a pooler a statement's parameters never reach another statement.
func TestFaultPooler(t *testing.T) {
	t.Parallel()
	a := newAPIOn(t, pooled(t, newDatabase(t)), Options{RequestTimeout: patience})
	const n = 600
	deleted, read := a.newTasks(n), a.newTasks(n)
	var clients sync.WaitGroup
	for ids := range slices.Chunk(deleted, n/8) {
		clients.Go(func() {
			for _, id := range ids {
				a.want(http.StatusNoContent, a.do("DELETE", "/api/tasks/"+id, ""))
			}
		})
	}
	for ids := range slices.Chunk(read, n/8) {
		clients.Go(func() {
			for _, id := range ids {
				if got := a.task(a.want(http.StatusOK, a.do("GET", "/api/tasks/"+id, ""))); got.ID != id {
					t.Errorf("asked for %s, got %s", id, got.ID)
				}
			}
		})
	}
	clients.Wait()
	if left := queryInt(t, a.dbURL, "SELECT count(*) FROM tasks WHERE id = ANY ($1::uuid[])", read); left != n {
		t.Errorf("of %d tasks that were only read, %d are left", n, left)
	}
	if left := queryInt(t, a.dbURL, "SELECT count(*) FROM tasks"); left != n {
		t.Errorf("%d tasks are left, not %d", left, n)
	}
}

// Services that start together behind a pooler do not get in each other's way.
func TestFaultPoolerMigration(t *testing.T) {
	t.Parallel()
	dbURL := newDatabase(t)
	url := pooled(t, dbURL)
	for range 5 {
		var stores sync.WaitGroup
		for range 8 {
			stores.Go(func() {
				db := open(t, url)
				defer db.Close()
				if err := NewStore(db).Migrate(t.Context()); err != nil {
					t.Error(err)
				}
			})
		}
		stores.Wait()
		execSQL(t, dbURL, "DROP TABLE tasks")
	}
}

// newStandby returns a synchronous standby of a primary, which commits nothing
// that its standby does not have. dir is for its files and its socket.
func newStandby(t testing.TB, primary *localDB, dir string) *localDB {
	t.Helper()
	pgCtlPath, err := filepath.EvalSymlinks(primary.bin + "/pg_ctl") // which may be all that is linked to
	cfg, cfgErr := pq.NewConfig(primary.URL)
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
	w := newWorkload(newAPIWithPool(t, dbURL, 6, prepareAlways, Options{RequestTimeout: 2 * time.Second}), 20_000)
	follow := func(to *localDB) {
		t.Helper()
		pgCtl(t, to, "promote")
		waitFor(t, "the service to be ready", func() bool { return w.do("GET", "/readyz", "").StatusCode == http.StatusOK })
		enough := w.used.Load() + 200
		waitFor(t, "requests to go on", func() bool { return w.used.Load() > enough })
	}
	// What the standby does not have is not acknowledged, even if the primary says
	// after all that it has it.
	thaw := freeze(t, second)
	writes := []action{opCreate, opCreateWithKey, opReplace, opPatch, opFlip, opDelete}
	together(len(writes), func(i int) {
		if c := w.send(writes[i], false); c.status == c.success {
			t.Errorf("%s was acknowledged without the standby", c.name)
		}
	})
	thaw()
	stop := w.start(6, 10*time.Millisecond)
	pgCtl(t, first, "stop", "-m", "immediate")
	follow(second)
	third := newStandby(t, second, thirdDir)
	freeze(t, second)
	follow(third)
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
	unlock = sync.OnceFunc(func() {
		tx.Rollback()
		db.Close()
	})
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
	a := newAPIWithPool(t, newDatabase(t), conns, prepareNever, Options{RequestTimeout: patience, MaxInFlight: inFlight})
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
	a := newAPIWithPool(t, newDatabase(t), conns, prepareNever, Options{RequestTimeout: patience})
	execSQL(t, a.dbURL, `CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(0.005); RETURN NEW; END'`)
	execSQL(t, a.dbURL, "CREATE TRIGGER slow BEFORE UPDATE ON tasks FOR EACH ROW EXECUTE FUNCTION slow()")
	type span struct{ start, end int64 }
	var clock atomic.Int64
	var mu sync.Mutex
	var spans []span
	var running sync.WaitGroup
	for ids := range slices.Chunk(a.newTasks(clients*n), n) {
		running.Go(func() {
			for _, id := range ids {
				start := clock.Add(1)
				a.want(http.StatusOK, a.do("PATCH", "/api/tasks/"+id+"/complete", ""))
				mu.Lock()
				spans = append(spans, span{start, clock.Add(1)})
				mu.Unlock()
			}
		})
	}
	running.Wait()
	most := 0
	for _, s := range spans {
		overtaking := 0
		for _, other := range spans {
			if other.start > s.start && other.end < s.end {
				overtaking++
			}
		}
		most = max(most, overtaking)
	}
	t.Logf("at most %d requests have overtaken another", most)
	if most > 2*clients {
		t.Errorf("a request was overtaken by %d others", most)
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
	a := newAPIWithPool(t, newDatabase(t), 1, prepareNever, Options{RequestTimeout: patience, MaxInFlight: inFlight})
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
	a := newAPIWithPool(t, newDatabase(t), 1, prepareNever, Options{RequestTimeout: patience})
	id := a.newTasks(1)[0]
	for name, request := range map[string]string{
		"without a body": "PATCH /api/tasks/" + id + "/complete HTTP/1.1\r\nHost: x\r\n\r\n",
		"with a body": "PUT /api/tasks/" + id + " HTTP/1.1\r\nHost: x\r\n" +
			"Content-Type: application/json\r\nContent-Length: 14\r\n\r\n{\"title\": \"x\"}",
		"with a body that means nothing": "DELETE /api/tasks/" + id + " HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}",
	} {
		unlock := lockTasks(t, a.dbURL, lockRow, id)
		executing := a.sendRaw(request)
		waitFor(t, "the statement to wait", func() bool { return waiting(t, a.dbURL) == 1 })
		queued := a.sendRaw(request)
		waitFor(t, "both requests to be there", func() bool { return strings.Contains(string(a.do("GET", "/metrics", "").body), "in_flight 3\n") })
		queued.Close()
		waitFor(t, "one of them to end", func() bool { return strings.Contains(string(a.do("GET", "/metrics", "").body), "in_flight 2\n") })
		executing.Close()
		waitFor(t, "the statement to end", func() bool { return waiting(t, a.dbURL) == 0 })
		waitFor(t, "its connection to be free", func() bool { return a.db.Stats().InUse == 0 })
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
	for _, prepare := range []prepareMode{prepareNever, prepareAlways} {
		t.Run(fmt.Sprintf("prepare=%v", prepare == prepareAlways), func(t *testing.T) {
			t.Parallel()
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
}

// What the server itself refuses or ends is 503, and nothing once it does not
// any more.
func TestFaultServerLimits(t *testing.T) {
	t.Parallel()
	dbURL := newDatabase(t)
	role := fmt.Sprintf("limited_%d", os.Getpid())
	execSQL(t, dbURL, "CREATE ROLE "+role+" LOGIN")
	t.Cleanup(func() { execSQL(t, testServer.URL, "DROP ROLE "+role) })
	owner := newAPIOn(t, dbURL, Options{})
	execSQL(t, dbURL, "GRANT SELECT, INSERT, UPDATE, DELETE ON tasks TO "+role)
	t.Cleanup(func() { execSQL(t, dbURL, "REVOKE ALL ON tasks FROM "+role) })
	a := newAPIOn(t, strings.Replace(dbURL, "user=postgres", "user="+role, 1), Options{RequestTimeout: patience})
	a.log.expected.Store(true)
	id := owner.newTasks(1)[0]
	version := int64(1)
	for _, limit := range []struct{ set, reset string }{
		{"default_transaction_read_only = on", "default_transaction_read_only"},
		{"statement_timeout = '50ms'", "statement_timeout"},
		{"lock_timeout = '50ms'", "lock_timeout"},
		{"CONNECTION LIMIT 0", ""},
	} {
		alter := func(what string) {
			execSQL(t, dbURL, "ALTER ROLE "+role+" "+what)
			execSQL(t, dbURL, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = $1", role)
			waitFor(t, "the connections to be gone", func() bool {
				return queryInt(t, dbURL, "SELECT count(*) FROM pg_stat_activity WHERE usename = $1", role) == 0
			})
		}
		set, reset := "SET "+limit.set, "RESET "+limit.reset
		if limit.reset == "" {
			set, reset = limit.set, "CONNECTION LIMIT -1"
		}
		alter(set)
		unlock := lockTasks(t, dbURL, lockRow, id)
		a.want503(a.do("PATCH", "/api/tasks/"+id+"/complete", ""))
		unlock()
		alter(reset)
		version++
		if got := a.task(a.want(http.StatusOK, a.do("PATCH", "/api/tasks/"+id+"/complete", ""))); got.Version != version {
			t.Errorf("%s: version %d, want %d", limit.set, got.Version, version)
		}
	}
}

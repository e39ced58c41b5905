package main

// handler_test.go has the harness of all tests that need a service: the real
// handler over real HTTP on a real PostgreSQL. Below it are the tests of what each
// operation does; request_test.go and response_test.go test what comes before and
// after. Every response that a test gets by [api.do] is compared with openapi.json.

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"database/sql"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unicode/utf16"
)

func TestMain(m *testing.M) {
	code := m.Run()
	if err := stopServer(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

// testServer is the PostgreSQL of all tests that need no other. It is started
// by the first of them.
var testServer struct {
	sync.Mutex
	*localDB
	dir       string
	databases int
}

func startServer() error {
	if testServer.localDB != nil {
		return nil
	}
	dir, err := os.MkdirTemp("", "tasks-test-")
	if err != nil {
		return err
	}
	testServer.dir = dir
	testServer.localDB, err = startLocalDB(context.Background(), dir, os.Getenv("PG_BIN"),
		"fsync=off", "full_page_writes=off", "max_connections=500")
	return err
}

func stopServer() error {
	if testServer.localDB != nil {
		if err := testServer.Stop(); err != nil {
			return err
		}
	}
	return os.RemoveAll(testServer.dir)
}

// newDatabase returns the URL of an empty database of the test's own.
func newDatabase(t testing.TB) string {
	t.Helper()
	testServer.Lock()
	defer testServer.Unlock()
	if err := startServer(); err != nil {
		t.Fatal(err)
	}
	testServer.databases++
	name := fmt.Sprintf("test_%d", testServer.databases)
	execSQL(t, testServer.URL, "CREATE DATABASE "+name)
	t.Cleanup(func() { execSQL(t, testServer.URL, "DROP DATABASE IF EXISTS "+name+" WITH (FORCE)") })
	return strings.Replace(testServer.URL, "dbname=postgres", "dbname="+name, 1)
}

// execSQL runs a statement on a connection of its own.
func execSQL(t testing.TB, url, statement string, args ...any) {
	t.Helper()
	db := open(t, url)
	defer db.Close()
	if _, err := db.Exec(statement, args...); err != nil {
		t.Fatalf("%s: %v", statement, err)
	}
}

func open(t testing.TB, url string) *sql.DB {
	t.Helper()
	db, err := OpenDB(url)
	if err != nil {
		t.Fatal(err)
	}
	return db
}

// api is a service under test.
type api struct {
	testing.TB
	url    string // of the HTTP server
	dbURL  string
	db     *sql.DB
	server *httptest.Server
	*Handler
	log *testLog
}

// newAPI returns a service on a database of its own.
func newAPI(t testing.TB, opts Options) *api {
	t.Helper()
	url := newDatabase(t)
	if os.Getenv("TASKS_TEST_POOLER") == "1" {
		url = pooled(t, url)
	}
	return newAPIOn(t, url, opts)
}

// newAPIOn returns a service on the database that dbURL names.
func newAPIOn(t testing.TB, dbURL string, opts Options) *api {
	t.Helper()
	return newAPIWithDB(t, dbURL, open(t, dbURL), opts)
}

// newAPIWithDB returns a service on a pool, which it closes in the end.
func newAPIWithDB(t testing.TB, dbURL string, db *sql.DB, opts Options) *api {
	t.Helper()
	a := &api{TB: t, dbURL: dbURL, db: db, log: &testLog{t: t}}
	t.Cleanup(func() { a.db.Close() })
	store := NewStore(a.db)
	if err := store.Migrate(t.Context()); err != nil {
		t.Fatal(err)
	}
	opts.Logger = slog.New(slog.NewTextHandler(a.log, nil))
	a.Handler = NewHandler(store, opts)
	a.listen(a.Handler)
	return a
}

// listen gives the service an HTTP server with the given handler.
func (a *api) listen(h http.Handler) {
	a.server = httptest.NewUnstartedServer(h)
	a.server.Config.DisableGeneralOptionsHandler = true
	a.server.Start()
	a.Cleanup(a.server.Close)
	a.url = a.server.URL
}

// with returns a service on the same store with other options.
func (a *api) with(opts Options) *api {
	a.Helper()
	b := *a
	opts.Logger = a.opts.Logger
	b.Handler = NewHandler(a.store, opts)
	b.listen(b.Handler)
	return &b
}

// as returns a service that authenticates all requests as the user's.
func (a *api) as(user string) *api {
	return a.with(Options{Authenticate: func(*http.Request) (string, error) { return user, nil }})
}

// testLog fails its test when an error is logged that none was expected.
type testLog struct {
	t        testing.TB
	expected atomic.Bool // errors are
	mu       sync.Mutex
	lines    bytes.Buffer
}

func (l *testLog) Write(line []byte) (int, error) {
	if bytes.Contains(line, []byte("level=ERROR")) && !l.expected.Load() {
		l.t.Errorf("logged: %s", line)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.lines.Write(line)
}

// String returns what has been logged so far.
func (l *testLog) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.lines.String()
}

// answer is a response whose body has been read.
type answer struct {
	*http.Response
	body []byte
}

// do sends a request and returns the answer. headers are names and values in
// turn. A body without a Content-Type gets application/json.
func (a *api) do(method, path, body string, headers ...string) *answer {
	a.Helper()
	var reader io.Reader
	if body != "" {
		reader = strings.NewReader(body)
	}
	req, err := http.NewRequestWithContext(a.Context(), method, a.url+path, reader)
	if err != nil {
		a.Fatal(err)
	}
	for i := 0; i < len(headers); i += 2 {
		req.Header.Add(headers[i], headers[i+1])
	}
	if _, ok := req.Header["Content-Type"]; body != "" && !ok {
		req.Header.Set("Content-Type", "application/json")
	}
	req.Host = req.Header.Get("Host") // if there is one
	// No redirects, and connections that no other test can break.
	resp, err := a.server.Client().Transport.RoundTrip(req)
	if err != nil {
		a.Fatalf("%s %s: %v", method, path, err)
	}
	defer resp.Body.Close()
	got, err := io.ReadAll(resp.Body)
	if err != nil {
		a.Fatalf("%s %s: reading the body: %v", method, path, err)
	}
	loadSpec(a).check(a, req, []byte(body), resp, got)
	return &answer{resp, got}
}

// want fails the test unless the answer has the status.
func (a *api) want(status int, got *answer) *answer {
	a.Helper()
	if got.StatusCode != status {
		a.Fatalf("%s %s: status %d, want %d: %s", got.Request.Method, got.Request.URL.RequestURI(), got.StatusCode, status, got.body)
	}
	return got
}

// task decodes the answer's body.
func (a *api) task(got *answer) Task {
	a.Helper()
	return decode[Task](a, got)
}

// create creates a task.
func (a *api) create(body string, headers ...string) Task {
	a.Helper()
	return a.task(a.want(http.StatusCreated, a.do("POST", "/api/tasks", body, headers...)))
}

// decode decodes the body of an answer.
func decode[T any](t testing.TB, got *answer) (v T) {
	t.Helper()
	if err := json.Unmarshal(got.body, &v); err != nil {
		t.Fatalf("%v: %s", err, got.body)
	}
	return v
}

// outcome is the status of an answer and, with 422, the places of its errors in
// alphabetical order. It fails the test unless an error is a problem document in
// every respect.
func (a *api) outcome(got *answer) string {
	a.Helper()
	status := fmt.Sprint(got.StatusCode)
	if got.StatusCode < 400 || got.Request.Method == http.MethodHead {
		return status
	}
	p := decode[problem](a, got)
	title := cmp.Or(http.StatusText(got.StatusCode), "Client Closed Request")
	want := problem{Type: "about:blank", Title: title, Status: got.StatusCode, Detail: p.Detail, RequestID: got.Header.Get("X-Request-ID"), Errors: p.Errors}
	if got, want := fmt.Sprintf("%+v", p), fmt.Sprintf("%+v", want); got != want {
		a.Errorf("problem %s, want %s", got, want)
	}
	for name, want := range map[string]string{"Content-Type": "application/problem+json", "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"} {
		if got := got.Header.Get(name); got != want {
			a.Errorf("%s: the header %s is %q, want %q", status, name, got, want)
		}
	}
	if p.Detail == "" || p.RequestID == "" || (p.Errors != nil) != (got.StatusCode == 422) || (got.Header.Get("Retry-After") != "") != (got.StatusCode == 503) {
		a.Errorf("%s: %s", status, got.body)
	}
	var places []string
	for _, v := range p.Errors {
		places = append(places, " "+v.Pointer+v.Parameter+v.Header)
	}
	return status + strings.Join(slices.Sorted(slices.Values(places)), "")
}

// expect sends a request like [api.do]. It fails the test unless the outcome is
// the one that is wanted.
func (a *api) expect(want, method, path, body string, headers ...string) *answer {
	a.Helper()
	got := a.do(method, path, body, headers...)
	if outcome := a.outcome(got); outcome != want {
		a.Errorf("%s %.200s %.200q: %s, want %s\nrequest:  %.500s\nresponse: %.500s", method, path, headers, outcome, want, body, got.body)
	}
	return got
}

// detail returns what a problem document says.
func (a *api) detail(got *answer) string {
	a.Helper()
	return decode[problem](a, got).Detail
}

// exec runs a statement.
func (a *api) exec(statement string, args ...any) {
	a.Helper()
	if _, err := a.db.Exec(statement, args...); err != nil {
		a.Fatalf("%s: %v", statement, err)
	}
}

// rawConn sends requests that net/http's client cannot send.
type rawConn struct {
	a *api
	net.Conn
	r *bufio.Reader
}

func (a *api) dial() *rawConn {
	a.Helper()
	c, err := net.Dial("tcp", a.server.Listener.Addr().String())
	if err != nil {
		a.Fatal(err)
	}
	a.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(30 * time.Second)) // to fail rather than hang
	return &rawConn{a, c, bufio.NewReader(c)}
}

// send sends a part of a request. An error shows in the answer.
func (c *rawConn) send(text string) { io.WriteString(c, text) }

// answer reads the answer to a request with the given method.
func (c *rawConn) answer(method string) *answer {
	c.a.Helper()
	resp, err := http.ReadResponse(c.r, &http.Request{Method: method, URL: new(url.URL)})
	if err != nil {
		c.a.Fatalf("%s: reading the answer: %v", method, err)
	}
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		c.a.Fatalf("%s: reading the answer's body: %v", method, err)
	}
	return &answer{resp, body}
}

// wish is a request on tasks and the status of its success.
type wish struct{ method, path, body, want string }

// operations returns one request for each operation on tasks, on the task with
// the given id.
func operations(id string) []wish {
	return []wish{
		{"POST", "/api/tasks", `{"title": "a"}`, "201"},
		{"GET", "/api/tasks", "", "200"},
		{"GET", "/api/tasks/" + id, "", "200"},
		{"PUT", "/api/tasks/" + id, `{"title": "a"}`, "200"},
		{"PATCH", "/api/tasks/" + id, `{"title": "a"}`, "200"},
		{"PATCH", "/api/tasks/" + id + "/complete", "", "200"},
		{"DELETE", "/api/tasks/" + id, "", "204"},
	}
}

// changes returns those that change a task.
func changes(id string) []wish { return operations(id)[3:] }

// withBody returns those that take a body, each with one.
func withBody(id string) []wish {
	ops := operations(id)
	ops[5].body = `{"completed":true}`
	return []wish{ops[0], ops[3], ops[4], ops[5]}
}

// noTask is the id of no task.
const noTask = "019c2292-294b-774b-8e0f-5b3a1f6c9d42"

// together calls f for 0 to n-1 at once.
func together(n int, f func(i int)) {
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() { f(i) })
	}
	wg.Wait()
}

// awaitQuery waits until a query's answer is true.
func awaitQuery(t testing.TB, db *sql.DB, what, query string) {
	t.Helper()
	waitFor(t, what, func() (ok bool) {
		if err := db.QueryRow(query).Scan(&ok); err != nil {
			t.Fatalf("%s: %v", query, err)
		}
		return ok
	})
}

// brief returns what a client may set of a task, and its version.
func brief(t Task) string {
	description := "null"
	if t.Description != nil {
		description = fmt.Sprintf("%q", *t.Description)
	}
	return fmt.Sprintf("%q %s %t v%d", t.Title, description, t.Completed, t.Version)
}

// §1 The resource

func TestRepresentation(t *testing.T) {
	t.Parallel()
	dbURL := newDatabase(t)
	execSQL(t, dbURL, `DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET timezone TO ''Asia/Kathmandu''; ALTER DATABASE %1$I SET quote_all_identifiers TO on; ALTER DATABASE %1$I SET standard_conforming_strings TO off', current_database()); END $$`)
	a := newAPIOn(t, dbURL, Options{})
	const form = `^\{"id":"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}",%s,"version":1,"created_at":"TIME","updated_at":"TIME"\}` + "\n$"
	times := strings.NewReplacer("TIME", `[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{6}Z`)
	for _, tt := range []struct{ body, want string }{
		{`{"title":"Buy milk"}`, `"user_id":null,"title":"Buy milk","description":null,"completed":false`},
		{` { "completed" : true , "description" : "2 l" , "title" : "a" , "user_id" : "alice" } `, `"user_id":"alice","title":"a","description":"2 l","completed":true`},
		{`{"title":"a","description":null,"user_id":null}`, `"user_id":null,"title":"a","description":null,"completed":false`},
		{`{"title":"a","description":""}`, `"user_id":null,"title":"a","description":"","completed":false`},
		{`{"title":"<a href='x'>&</a>"}`, `"user_id":null,"title":"<a href='x'>&</a>","description":null,"completed":false`},
		{`{"id":"x","version":null,"created_at":{},"updated_at":[[1e999]],"title":"a"}`, `"user_id":null,"title":"a","description":null,"completed":false`},
	} {
		begin := time.Now().Truncate(time.Microsecond)
		got := a.want(201, a.do("POST", "/api/tasks", tt.body))
		task := a.task(got)
		if want := times.Replace(fmt.Sprintf(form, regexp.QuoteMeta(tt.want))); !regexp.MustCompile(want).Match(got.body) {
			t.Errorf("got  %s\nwant %s", got.body, tt.want)
		}
		if !task.CreatedAt.Equal(task.UpdatedAt) || task.CreatedAt.Before(begin) || task.CreatedAt.After(time.Now()) {
			t.Errorf("created at %v, updated at %v, sent at %v", task.CreatedAt, task.UpdatedAt, begin)
		}
		again := a.want(200, a.do("GET", got.Header.Get("Location"), ""))
		if !bytes.Equal(again.body, got.body) || again.Header.Get("ETag") != `"1"` || got.Header.Get("ETag") != `"1"` || again.Request.URL.Path != "/api/tasks/"+task.ID {
			t.Errorf("created %s\n%s\nfetched %s\n%s", got.Header, got.body, again.Header, again.body)
		}
	}
}

// The order of ids is that of creation, also among tasks made within the same
// millisecond.
func TestIDsOrderByCreation(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{})
	var last Task
	for range 30 {
		task := a.create(`{"title":"a"}`)
		if task.ID <= last.ID || !task.CreatedAt.After(last.CreatedAt) {
			t.Fatalf("%s (%v) was created after %s (%v)", task.ID, task.CreatedAt, last.ID, last.CreatedAt)
		}
		last = task
	}
	together(200, func(int) { a.create(`{"title":"a"}`) })
	tasks := decode[[]Task](t, a.want(200, a.do("GET", "/api/tasks?limit=1000", "")))
	if len(tasks) != 230 || !slices.IsSortedFunc(tasks, func(a, b Task) int { return a.CreatedAt.Compare(b.CreatedAt) }) {
		t.Errorf("%d tasks, want 230 in the order of their creation", len(tasks))
	}
}

// updated_at moves with each change, but never backwards.
func TestUpdatedAt(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{})
	for last, moves := range map[string]bool{"-1 hour": true, "+1 hour": false} { // the last change, from now
		for _, op := range changes(a.create(`{"title":"a"}`).ID)[:3] {
			a.exec("UPDATE tasks SET created_at = created_at - interval '2 hours', updated_at = now() + $1::interval", last)
			path := strings.TrimSuffix(op.path, "/complete")
			before, same := a.task(a.do("GET", path, "")), a.task(a.do("PATCH", path, "{}"))
			after := a.task(a.do(op.method, op.path, op.body))
			if same.UpdatedAt != before.UpdatedAt || after.CreatedAt != before.CreatedAt ||
				after.UpdatedAt.Before(before.UpdatedAt) || after.UpdatedAt.After(before.UpdatedAt) != moves {
				t.Errorf("changed %s ago by %s %s: from %v\nby a patch of nothing to %v\nand then to %v", last, op.method, op.path, before, same, after)
			}
		}
	}
}

// The longest texts fit, together and however they are escaped, and one more
// code point is refused in each.
func TestTextLimits(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{})
	ops := withBody(a.create(`{"title":"a"}`).ID)[:3]
	limits := map[string]int{"title": 200, "description": 10_000, "user_id": 255}
	for _, character := range []string{"a", "e\u0301", "\U0010FFFF"} {
		body := func(tooLong string) string {
			body := "{" + escape(nil, "completed") + ":true"
			for name, n := range limits {
				text := []rune(strings.Repeat(character, n))[:n]
				if name == tooLong {
					text = append(text, '-')
				}
				body += "," + escape(nil, name) + ":" + escape(nil, string(text))
			}
			return body + "}"
		}
		for _, op := range ops {
			got := a.expect(op.want, op.method, op.path, body(""))
			a.expect("200", "PUT", ops[1].path, string(got.body)) // sent back
			for name := range limits {
				if name != "user_id" || op.method == "POST" {
					a.expect("422 #/"+name, op.method, op.path, body(name))
				}
			}
		}
	}
}

// Every code point that the contract allows comes back as it was sent, in every
// member, however it was escaped and whatever its neighbours. The operations take
// turns.
func TestTexts(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{})
	rng := rand.New(rand.NewPCG(1, 2))
	difficult := []rune("\x01\b\t\n\f\r\x1f\"\\/<>&'\x7f\u0080\u0085\u00a0\u0301\u200d\u200e\u2028\u2029\ud7ff\ue000\ufeff\ufffd\ufffe\uffff\U00010000\U0001F600\U0010FFFF")
	var id, owner string
	for r, i := rune(1), 0; r <= 0x10FFFF; i++ {
		text := slices.Clone(difficult)
		rng.Shuffle(len(text), func(i, j int) { text[i], text[j] = text[j], text[i] })
		if i%3 == 0 {
			owner = string(text[:20])
		}
		title := string(text) + "x"
		for ; len(text) < 10_000 && r <= 0x10FFFF; r++ {
			if !utf16.IsSurrogate(r) {
				text = append(text, r)
			}
			if r > 0xFFFF {
				r += 15 // the rest has no special cases
			}
		}
		op, query := withBody(id)[i%3], "?user_id="+url.QueryEscape(owner)
		got := a.task(a.do(op.method, op.path+query, fmt.Sprintf(`{"description":%s,%s:%s,"user_id":%s}`,
			escape(rng, string(text)), escape(rng, "title"), escape(rng, title), escape(rng, owner))))
		id = got.ID
		if i%2 == 0 {
			got = a.task(a.do("GET", "/api/tasks/"+id+query, ""))
		} else if page := decode[[]Task](t, a.do("GET", "/api/tasks"+query, "")); len(page) == 1 {
			got = page[0]
		}
		if got.UserID == nil || *got.UserID != owner || got.Title != title || *got.Description != string(text) {
			t.Fatalf("by %s: sent %+q %+q %+q\ngot %s", op.method, owner, title, string(text), brief(got))
		}
	}
}

// escape returns text as a JSON string, each code point in one of the forms that
// JSON has for it, or in the longest if rng is nil.
func escape(rng *rand.Rand, text string) string {
	short := map[rune]string{'"': `\"`, '\\': `\\`, '/': `\/`, '\b': `\b`, '\f': `\f`, '\n': `\n`, '\r': `\r`, '\t': `\t`}
	b := []byte{'"'}
	for _, r := range text {
		form := 2
		if rng != nil {
			form = rng.IntN(4)
		}
		switch {
		case form == 0 && r >= ' ' && r != '"' && r != '\\':
			b = append(b, string(r)...)
		case form == 1 && short[r] != "":
			b = append(b, short[r]...)
		default:
			for _, unit := range utf16.Encode([]rune{r}) {
				b = fmt.Appendf(b, []string{`\u%04x`, `\u%04X`}[form%2], unit)
			}
		}
	}
	return string(append(b, '"'))
}

// §2 Operations

func TestOperations(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{})
	const everything = `{"title":"new","description":"more","completed":false}`
	const readOnly = `"user_id":"bob","id":1,"version":7,"created_at":"","updated_at":null}`
	for _, tt := range []struct{ method, path, body, want string }{
		{"GET", "", "", `"old" "text" true v1`},
		{"PUT", "", everything, `"new" "more" false v2`},
		{"PUT", "", `{"title":"new"}`, `"new" null false v2`},
		{"PUT", "", `{"title":"new","description":null,"completed":true}`, `"new" null true v2`},
		{"PUT", "", `{"title":"old","description":"text","completed":true}`, `"old" "text" true v2`},
		{"PUT", "", `{"title":"new",` + readOnly, `"new" null false v2`},
		{"PATCH", "", everything, `"new" "more" false v2`},
		{"PATCH", "", `{}`, `"old" "text" true v1`},
		{"PATCH", "", `{` + readOnly, `"old" "text" true v1`},
		{"PATCH", "", `{"title":"new"}`, `"new" "text" true v2`},
		{"PATCH", "", `{"description":"more"}`, `"old" "more" true v2`},
		{"PATCH", "", `{"description":""}`, `"old" "" true v2`},
		{"PATCH", "", `{"description":null}`, `"old" null true v2`},
		{"PATCH", "", `{"completed":false}`, `"old" "text" false v2`},
		{"PATCH", "", `{"completed":true}`, `"old" "text" true v2`},
		{"PATCH", "/complete", "", `"old" "text" false v2`},
		{"PATCH", "/complete", `{"completed":false}`, `"old" "text" false v2`},
		{"PATCH", "/complete", `{"completed":true}`, `"old" "text" true v2`},
		{"PATCH", "/complete", `{"completed":false,` + readOnly, `"old" "text" false v2`},
	} {
		before := a.create(`{"title":"old","description":"text","completed":true,"user_id":"alice"}`)
		got := a.want(200, a.do(tt.method, "/api/tasks/"+before.ID+tt.path, tt.body))
		after := a.task(got)
		if brief(after) != tt.want || after.ID != before.ID || *after.UserID != "alice" || after.CreatedAt != before.CreatedAt {
			t.Errorf("%s%s %s: got %s, want %s", tt.method, tt.path, tt.body, got.body, tt.want)
		}
		again := a.want(200, a.do("GET", "/api/tasks/"+before.ID, ""))
		if etag := fmt.Sprintf(`"%d"`, after.Version); !bytes.Equal(again.body, got.body) || got.Header.Get("ETag") != etag || again.Header.Get("ETag") != etag {
			t.Errorf("%s%s %s: got %s\n%s\nfetched %s\n%s", tt.method, tt.path, tt.body, got.Header, got.body, again.Header, again.body)
		}
	}
}

func TestDelete(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{})
	other, id := a.create(`{"title":"a"}`).ID, a.create(`{"title":"a"}`).ID
	if got := a.want(204, a.do("DELETE", "/api/tasks/"+id, "")); len(got.body) > 0 {
		t.Errorf("the response has the body %q", got.body)
	}
	for _, op := range operations(id)[2:] {
		a.expect("404", op.method, op.path, op.body)
	}
	a.expect("200", "GET", "/api/tasks/"+other, "")
}

// A client may send back what it received, whole or changed.
func TestSendBack(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{})
	received := a.want(201, a.do("POST", "/api/tasks", `{"title":"a","description":"b","user_id":"alice"}`))
	path := "/api/tasks/" + a.task(received).ID
	for method, want := range map[string]string{"PUT": `"PUT" "b" false`, "PATCH": `"PATCH" "b" false`} {
		got := a.task(a.want(200, a.do(method, path, strings.Replace(string(received.body), `"a"`, `"`+method+`"`, 1))))
		if !strings.HasPrefix(brief(got), want) || *got.UserID != "alice" {
			t.Errorf("%s: %s", method, brief(got))
		}
	}
	if another := a.create(string(received.body)); another.ID == a.task(received).ID || another.Version != 1 {
		t.Errorf("POST: %+v", another)
	}
}

// A trailing slash names the same resource in the API; all other paths are
// compared as they stand, but for percent-escapes within a segment.
func TestRouting(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{})
	id := a.create(`{"title":"a"}`).ID
	for _, op := range operations(id)[:6] {
		a.expect(op.want, op.method, op.path+"/", op.body)
	}
	const item, complete = "/api/tasks/{id}", "/api/tasks/{id}/complete"
	for _, tt := range []struct{ want, allow, requests string }{
		{"200", "", "HEAD /api/tasks/, GET /api/tasks/?limit=1, GET /api/tasks?, GET /api/t%61sks, GET /%61pi/tasks/"},
		{"405", "GET, HEAD, POST", "PUT /api/tasks, PATCH /api/tasks, DELETE /api/tasks, DELETE /api/tasks/, OPTIONS /api/tasks, TRACE /api/tasks, " +
			"CONNECT /api/tasks, PROPFIND /api/tasks, A!#$%&'*+-.^_`|~1 /api/tasks"},
		{"405", "DELETE, GET, HEAD, PATCH, PUT", "POST " + item + ", OPTIONS " + item + ", POST /api/tasks/nonsense"},
		{"405", "PATCH", "GET " + complete + ", HEAD " + complete + ", PUT " + complete + ", DELETE " + complete + "/, OPTIONS " + complete},
		{"405", "GET, HEAD", "POST /, POST /healthz, DELETE /readyz, PUT /openapi.json, PATCH /docs, OPTIONS /metrics"},
		{"404", "", "GET //, POST //, GET /., GET /./, GET /.., GET /x, HEAD /x, OPTIONS /x, GET /%2F, GET /api, GET /api/, GET /API/TASKS, GET /api/task, GET //api/tasks, " +
			"GET /api//tasks, POST /api//tasks, GET /api/tasks//, POST /api/tasks//, GET /api/tasks/., GET /api/./tasks, GET /api/x/../tasks, GET /api%2Ftasks, " +
			"GET /api/tasks/%2F, POST /api/tasks/%2F, PUT " + item + "%2F, DELETE /api/tasks/x/../{id}, GET " + item + "//, GET /api/tasks//{id}, " +
			"PATCH " + item + "%2Fcomplete, PATCH " + item + "//complete, PATCH /api/tasks//complete, PATCH " + item + "/Complete, PATCH " + complete + "/x, " +
			"GET /healthz/, GET /docs/, GET /docs/index.html, GET /metrics/, GET /openapi.json/"},
	} {
		for request := range strings.SplitSeq(strings.ReplaceAll(tt.requests, "{id}", id), ", ") {
			method, path, _ := strings.Cut(request, " ")
			if allow := elements(a.expect(tt.want, method, path, "").Header.Get("Allow")); allow != tt.allow {
				t.Errorf("%s: Allow: %s, want %s", request, allow, tt.allow)
			}
		}
	}
	// What net/http's client does not send.
	for request, want := range map[string]string{
		"OPTIONS *": "404", "GET *": "404", "CONNECT /api/tasks": "405", "post /api/tasks": "405",
		"GET http://h/api/tasks": "200", "GET http://h//api/tasks": "404", "DELETE http://h/api/task": "404",
	} {
		if got := a.outcome(a.sendRaw(request + " HTTP/1.1\r\nHost: h\r\n\r\n").answer("GET")); got != want {
			t.Errorf("%s: %s, want %s", request, got, want)
		}
	}
}

// elements returns the elements of a header field that is a list, in
// alphabetical order.
func elements(list string) string {
	elements := strings.Split(list, ", ")
	slices.Sort(elements)
	return strings.Join(elements, ", ")
}

func TestHead(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{})
	id := a.create(`{"title":"a"}`).ID
	a.create(`{"title":"b"}`)
	for path, want := range map[string]int{
		"/api/tasks": 200, "/api/tasks?limit=1": 200, "/api/tasks?limit=0": 422, "/api/tasks/" + id: 200, "/api/tasks/" + noTask: 404, "/api/tasks/x": 404, "/x": 404,
		"/healthz": 200, "/readyz": 200, "/openapi.json": 200, "/docs": 200, "/": 307, "/api/tasks/" + id + "/": 304, "/docs?": 304,
	} {
		header := []string{"X-Request-ID", "1"}
		if want == 304 {
			header = append(header, "If-None-Match", "*")
		}
		get, head := a.want(want, a.do("GET", path, "", header...)), a.want(want, a.do("HEAD", path, "", header...))
		for _, got := range []*answer{get, head} {
			got.Header.Del("Date")
			if got.Header.Get("Content-Length") == "0" {
				got.Header.Del("Content-Length") // as good as absent
			}
		}
		if got, want := fmt.Sprint(head.Header), fmt.Sprint(get.Header); got != want || len(head.body) > 0 {
			t.Errorf("%s: got %s and a body of %d bytes\nwant %s", path, got, len(head.body), want)
		}
	}
}

// The other pages

func TestPages(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{})
	for _, tt := range []struct{ path, want, location string }{
		{"/healthz", `{"status":"ok"}` + "\n", ""},
		{"/readyz", `{"status":"ok"}` + "\n", ""},
		{"/openapi.json", string(openAPI), ""},
		{"/docs", string(docs), ""},
		{"/", "", "/docs"},
	} {
		got := a.do("GET", tt.path+"?whatever=1", "")
		if string(got.body) != tt.want || got.Header.Get("Location") != tt.location {
			t.Errorf("%s: %s %s\n%.300s", tt.path, got.Status, got.Header, got.body)
		}
		tag, document := got.Header.Get("ETag"), tt.path == "/docs" || tt.path == "/openapi.json"
		if document != (tag != "") {
			t.Errorf("%s: ETag %s", tt.path, tag)
		}
		if !document {
			continue
		}
		for condition, want := range map[string]string{tag: "304", "W/" + tag: "304", `"x", ` + tag: "304", "*": "304", `"x"`: "200", tag[:9] + `"`: "200"} {
			if again := a.expect(want, "GET", tt.path, "", "If-None-Match", condition); again.Header.Get("ETag") != tag || want == "304" && len(again.body) > 0 {
				t.Errorf("%s with If-None-Match: %s: %s\n%.300s", tt.path, condition, again.Header, again.body)
			}
		}
	}
}

// A checkout with other line ends serves the same documents, and the policy of
// the page fits what browsers read.
func TestLineEnds(t *testing.T) {
	t.Parallel()
	want := newPage("text/html", docs)
	for _, end := range []string{"\r\n", "\r"} {
		if got := newPage("text/html", bytes.ReplaceAll(docs, []byte("\n"), []byte(end))); !bytes.Equal(got.body, docs) || got.header.Get("ETag") != want.header.Get("ETag") {
			t.Errorf("the page differs after a checkout with %q", end)
		}
	}
	policy := newAPI(t, Options{}).do("GET", "/docs", "").Header.Get("Content-Security-Policy")
	for _, element := range []string{"script", "style"} {
		text := regexp.MustCompile("(?s)<" + element + ">(.*)</" + element + ">").FindSubmatch(docs)[1]
		if source := element + "-src 'sha256-" + hash(text) + "';"; !strings.Contains(policy, source) {
			t.Errorf("%s is not in %s", source, policy)
		}
	}
}

func TestReady(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{})
	a.log.expected.Store(true)
	b := a.with(Options{})
	b.Drain()
	b.expect("503", "GET", "/readyz", "")
	b.expect("200", "GET", "/healthz", "")
	b.create(`{"title":"a"}`)
	a.expect("200", "GET", "/readyz", "")
	var name string
	if err := a.db.QueryRow("SELECT current_database()").Scan(&name); err != nil {
		t.Fatal(err)
	}
	execSQL(t, testServer.URL, "DROP DATABASE "+name+" WITH (FORCE)")
	for range 2 {
		a.expect("503", "GET", "/readyz", "")
		for _, op := range operations(noTask) {
			a.expect("503", op.method, op.path, op.body)
		}
	}
	a.expect("200", "GET", "/healthz", "")
}

// Clients below a prefix are sent to paths below it.
func TestPrefix(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{Prefix: "/todo"})
	for range 2 {
		got := a.want(201, a.do("POST", "/api/tasks/", `{"title":"a"}`))
		if location := got.Header.Get("Location"); location != "/todo/api/tasks/"+a.task(got).ID {
			t.Errorf("Location: %s", location)
		}
	}
	if link := a.do("GET", "/api/tasks/?limit=1", "").Header.Get("Link"); !strings.HasPrefix(link, "</todo/api/tasks?after=") {
		t.Errorf("Link: %s", link)
	}
	if location := a.expect("307", "GET", "/", "").Header.Get("Location"); location != "/todo/docs" {
		t.Errorf("/ redirects to %s", location)
	}
	doc := decode[struct{ Servers []struct{ URL string } }](t, a.do("GET", "/openapi.json", ""))
	if len(doc.Servers) != 1 || doc.Servers[0].URL != "/todo" {
		t.Errorf("servers: %+v", doc.Servers)
	}
}

// Numbers below zero mean the defaults.
func TestOptions(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{RequestTimeout: -time.Second, MaxInFlight: -1})
	a.create(`{"title":"a"}`)
	if a.opts.RequestTimeout != 5*time.Second || cap(a.slots) != 1000 {
		t.Errorf("options: %+v", a.opts)
	}
}

// §4 Listing

// titles lists a page, by its tasks' titles.
func (a *api) titles(got *answer) string {
	a.Helper()
	var titles []string
	for _, task := range decode[[]Task](a, a.want(200, got)) {
		titles = append(titles, task.Title)
	}
	return strings.Join(titles, " ")
}

// next returns the path of the page that follows, "" after the last.
func (a *api) next(got *answer) string {
	a.Helper()
	link := got.Header.Get("Link")
	if link == "" {
		return ""
	}
	parts := regexp.MustCompile(`^<(/api/tasks\?[!-;=?-~]+)>; rel="next"$`).FindStringSubmatch(link)
	if parts == nil {
		a.Fatalf("Link: %s", link)
	}
	return parts[1]
}

func TestList(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{})
	if got := a.want(200, a.do("GET", "/api/tasks", "")); string(got.body) != "[]\n" {
		t.Errorf("without tasks: %q", got.body)
	}
	ids := map[string]string{}
	for i, title := range strings.Fields("a b c d e f") {
		owner := []string{`"alice"`, `"bob"`, `null`}[i%3]
		ids[title] = a.create(fmt.Sprintf(`{"title":%q,"completed":%t,"user_id":%s}`, title, i%2 == 1, owner)).ID
	}
	a.want(200, a.do("PATCH", "/api/tasks/"+ids["a"], `{"description":"changed"}`)) // which is no creation
	a.want(204, a.do("DELETE", "/api/tasks/"+ids["e"], ""))
	for query, want := range map[string]string{
		"":                                    "a b c d f",
		"?sort=created_at":                    "a b c d f",
		"?sort=-created_at":                   "f d c b a",
		"?completed=true":                     "b d f",
		"?completed=false":                    "a c",
		"?user_id=alice":                      "a d",
		"?user_id=bob":                        "b",
		"?user_id=carol":                      "",
		"?user_id=null":                       "",
		"?user_id=alice&completed=true":       "d",
		"?sort=-created_at&user_id=alice":     "d a",
		"?limit=1":                            "a",
		"?limit=1&sort=-created_at":           "f",
		"?limit=5":                            "a b c d f",
		"?after=" + ids["b"]:                  "c d f",
		"?after=" + strings.ToUpper(ids["b"]): "c d f",
		"?sort=-created_at&after=" + ids["c"]: "b a",
		"?after=" + ids["e"]:                  "f", // which is deleted
		"?sort=-created_at&limit=2&after=" + ids["e"]:                                  "d c",
		"?after=00000000-0000-0000-0000-000000000000":                                  "a b c d f",
		"?after=" + ids["f"]:                                                           "",
		"?user_id=alice&after=" + ids["b"]:                                             "d",
		"?after=" + ids["a"] + "&limit=1&sort=created_at&completed=true&user_id=alice": "d",
		"?&limit=2&&":  "a b",
		"?%6Cimit=%32": "a b",
	} {
		got := a.do("GET", "/api/tasks"+query, "", "If-None-Match", "*", "If-Match", `"9"`)
		if titles := a.titles(got); titles != want || got.Header.Get("ETag") != "" || got.Header.Get("Cache-Control") != "no-cache" || got.body[0] != '[' {
			t.Errorf("%s: got %q, want %q: %s\n%s", query, titles, want, got.Header, got.body)
		}
	}
	task := a.want(200, a.do("GET", "/api/tasks/"+ids["a"], "")).body
	if got := a.want(200, a.do("GET", "/api/tasks?limit=1", "")).body; string(got) != "["+strings.TrimSpace(string(task))+"]\n" {
		t.Errorf("the task is\n%s, on a page\n%s", task, got)
	}
}

func TestPageSize(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{})
	a.exec("INSERT INTO tasks (id, title) SELECT " + idOf("n") + ", 'a' FROM generate_series(1, 1001) n")
	check := func(path string, want int, more bool) (next string) {
		t.Helper()
		got := a.want(200, a.do("GET", path, ""))
		next = a.next(got)
		if n := len(decode[[]Task](t, got)); n != want || (next != "") != more {
			t.Errorf("%s: %d tasks and then %q", path, n, next)
		}
		return next
	}
	check("/api/tasks", 100, true)
	check("/api/tasks?limit=1", 1, true)
	check("/api/tasks?limit=99", 99, true)
	check("/api/tasks?limit=1000&after=00000000-0000-0000-0000-000000000000", 1000, true)
	check(check("/api/tasks?limit=1000", 1000, true), 1, false)
	a.exec("DELETE FROM tasks WHERE id = (SELECT id FROM tasks LIMIT 1)")
	check("/api/tasks?limit=1000", 1000, false)
}

// next repeats the other parameters, whatever they contain.
func TestNextRepeatsParameters(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{})
	for _, owner := range []string{"alice", "a&b", "a b", "a+b", "50%", "é<>\"'", "#?/=;,", "\n\x7f\u2028", "🙂", strings.Repeat("\U0010FFFF", 255)} {
		for range 3 {
			a.create(`{"title":"a","completed":true,"user_id":` + escape(nil, owner) + `}`)
		}
		path := "/api/tasks?sort=-created_at&limit=2&completed=true&user_id=" + url.QueryEscape(owner)
		next := a.next(a.want(200, a.do("GET", path, "")))
		want, _ := url.Parse(path)
		got, err := url.Parse(next)
		if err != nil {
			t.Fatal(err)
		}
		query := got.Query()
		query.Del("after")
		if query.Encode() != want.Query().Encode() {
			t.Errorf("after %s comes %s", path, next)
		}
		a.want(200, a.do("GET", next, ""))
	}
	// Nor is the owner lost among more separators than net/url takes.
	got := a.sendRaw("GET /api/tasks?user_id=alice&limit=1" + strings.Repeat("&", 20_000) + " HTTP/1.1\r\nHost: h\r\n\r\n").answer("GET")
	if next := a.next(got); !strings.Contains(next, "user_id=alice") || !strings.Contains(next, "limit=1") {
		t.Errorf("next is %q", next)
	}
}

// While tasks come and go, the one that next names among them, a walk yields
// each that stays exactly once.
func TestWalk(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{})
	for _, query := range []string{"?limit=1", "?limit=3&sort=-created_at", "?limit=2&completed=true&user_id=alice", "?limit=2&completed=false&sort=-created_at"} {
		a.exec("DELETE FROM tasks")
		body := fmt.Sprintf(`{"title":"stays","user_id":"alice","completed":%t}`, strings.Contains(query, "=true"))
		stays, seen := map[string]bool{}, map[string]bool{}
		for range 10 {
			stays[a.create(body).ID] = true
			a.create(strings.Replace(body, "stays", "goes", 1))
		}
		for path := "/api/tasks" + query; path != ""; {
			got := a.want(200, a.do("GET", path, ""))
			page := decode[[]Task](a, got)
			for i, task := range page {
				if seen[task.ID] {
					t.Errorf("%s: %s came twice", query, task.ID)
				}
				seen[task.ID] = true
				if !stays[task.ID] && (i == len(page)-1 || i == 0) {
					a.want(204, a.do("DELETE", "/api/tasks/"+task.ID, ""))
				}
			}
			if len(seen) < 30 { // or, oldest first, it would never end
				a.create(strings.Replace(body, "stays", "comes", 1))
			}
			path = a.next(got)
		}
		for id := range stays {
			if !seen[id] {
				t.Errorf("%s: %s did not come", query, id)
			}
		}
	}
}

// §5 Concurrency and retries

// Of many changes of the same version one wins.
func TestConcurrentUpdates(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{})
	for i := range 4 {
		id := a.create(`{"title":"old"}`).ID
		op := changes(id)[i]
		var won atomic.Int32
		together(20, func(int) {
			if outcome := a.outcome(a.do(op.method, op.path, op.body, "If-Match", `"1"`)); outcome == op.want {
				won.Add(1)
			} else if outcome != "412" && (outcome != "404" || op.method != "DELETE") {
				t.Error(outcome)
			}
		})
		now := a.do("GET", "/api/tasks/"+id, "")
		if won.Load() != 1 || op.method != "DELETE" && a.task(now).Version != 2 {
			t.Errorf("%s %s: %d of 20 won, and it is now %s", op.method, op.path, won.Load(), now.body)
		}
	}
}

// Without If-Match every change counts, each as a whole.
func TestConcurrentChanges(t *testing.T) {
	t.Parallel()
	for _, isolation := range []string{"read committed", "repeatable read", "serializable"} {
		dbURL := newDatabase(t)
		execSQL(t, dbURL, fmt.Sprintf("DO $$ BEGIN EXECUTE format('ALTER DATABASE %%I SET default_transaction_isolation TO %%L', current_database(), '%s'); END $$", isolation))
		a := newAPIOn(t, dbURL, Options{})
		path := "/api/tasks/" + a.create(`{"title":"a"}`).ID
		var completed atomic.Int32
		together(20, func(int) {
			if a.task(a.want(200, a.do("PATCH", path+"/complete", ""))).Completed {
				completed.Add(1)
			}
		})
		if now := brief(a.task(a.do("GET", path, ""))); now != `"a" null false v21` || completed.Load() != 10 {
			t.Errorf("after 20 flips, %d of them to true, it is %s", completed.Load(), now)
		}
		together(20, func(i int) {
			got := a.task(a.want(200, a.do("PUT", path, fmt.Sprintf(`{"title":"%d","description":"%[1]d"}`, i))))
			if want := fmt.Sprint(i); got.Title != want || *got.Description != want {
				t.Errorf("replaced by %s: %s", want, brief(got))
			}
			got = a.task(a.want(200, a.do("PATCH", path, `{"completed":true}`)))
			if got.Title != *got.Description || !got.Completed {
				t.Errorf("patched: %s", brief(got))
			}
		})
		if now := a.task(a.do("GET", path, "")); now.Version != 61 {
			t.Errorf("after 60 changes it is %s", brief(now))
		}
	}
}

func TestIdempotencyKey(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{})
	const created, replayed, reused = "created", "replayed", "422 Idempotency-Key"
	const first, least = `{"title":"a","description":"b","completed":true,"user_id":"alice"}`, `{"title":"a"}`
	for i, tt := range []struct{ first, query, second, want string }{
		{first, "", first, replayed},
		{first, "", ` { "user_id":"alice", "completed" : true, "d\u0065scription":"\u0062","title":"a", "id":"x" }`, replayed},
		{first, "?user_id=alice", `{"title":"a","description":"b","completed":true}`, replayed},
		{first, "", `{"title":"A","description":"b","completed":true,"user_id":"alice"}`, reused},
		{first, "", `{"title":"a","description":"","completed":true,"user_id":"alice"}`, reused},
		{first, "", `{"title":"a","completed":true,"user_id":"alice"}`, reused},
		{first, "", `{"title":"a","description":"b","completed":false,"user_id":"alice"}`, reused},
		{first, "", `{"title":"b","description":"a","completed":true,"user_id":"alice"}`, reused},
		{first, "", `{"title":"a","description":"b","completed":true,"user_id":"bob"}`, created},
		{first, "", `{"title":"a","description":"b","completed":true}`, created},
		{least, "?user_id=alice", least, created},
		{least, "", least, replayed},
		{least, "", `{"title":"b"}`, reused},
		{least, "", `{"title":"a","description":null,"completed":false,"user_id":null}`, replayed},
		{least, "", `{"title":"a","description":""}`, reused},
		{`{"title":"é"}`, "", `{"title":"e\u0301"}`, reused},
		{least, "", `{"title":""}`, "422 #/title"},
	} {
		key := fmt.Sprintf("key-%d", i)
		one := a.want(201, a.do("POST", "/api/tasks", tt.first, "Idempotency-Key", key))
		two := a.do("POST", "/api/tasks"+tt.query, tt.second, "Idempotency-Key", key)
		outcome := a.outcome(two)
		if outcome == "201" {
			outcome = map[string]string{"": created, "true": replayed}[two.Header.Get("Idempotency-Replayed")]
		}
		same := one.Header.Get("Location") == two.Header.Get("Location")
		if outcome != tt.want || one.Header.Get("Idempotency-Replayed") != "" || same != (tt.want == replayed) || same && !bytes.Equal(one.body, two.body) {
			t.Errorf("%s, want %s: %s\nfirst  %s\nsecond %s", outcome, tt.want, two.Header, one.body, two.body)
		}
	}
	// Keys are taken as they stand. Without one, a repeat is another task.
	seen := map[string]bool{a.create(least).ID: true}
	for _, header := range [][]string{{}, {"Idempotency-Key", "key"}, {"Idempotency-Key", "Key"}, {"Idempotency-Key", `"key"`}, {"Idempotency-Key", "key,"}, {"Idempotency-Key", "key;a=b"}} {
		seen[a.create(least, header...).ID] = true
	}
	if len(seen) != 7 {
		t.Errorf("7 creations made %d tasks", len(seen))
	}
}

// A key whose task is deleted meanwhile is a new one.
func TestIdempotencyKeyDeletedMeanwhile(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{RequestTimeout: patience})
	together(4, func(i int) {
		for range 300 {
			got := a.do("POST", "/api/tasks", fmt.Sprintf(`{"title":"%d"}`, i), "Idempotency-Key", "k")
			if got.StatusCode == 201 {
				a.do("DELETE", got.Header.Get("Location"), "")
			} else {
				a.want(422, got)
			}
		}
	})
}

func TestIdempotencyKeyLivesWithItsTask(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{})
	repeat := func() *answer {
		return a.want(201, a.do("POST", "/api/tasks", `{"title":"a"}`, "Idempotency-Key", "k"))
	}
	first := a.task(repeat())
	path := "/api/tasks/" + first.ID
	if queryInt(t, a.dbURL, `SELECT count(*) FROM tasks WHERE idempotency_digest = '\x9730af748a908ea9d0d2491d91f2fe49fd53a4eef793e3265ad06bb209c59d2f'`) != 1 {
		t.Error("keys of an earlier version have another digest")
	}
	changed := a.want(200, a.do("PATCH", path, `{"title":"b"}`))
	if got := repeat(); !bytes.Equal(got.body, changed.body) || got.Header.Get("ETag") != `"2"` || got.Header.Get("Idempotency-Replayed") != "true" {
		t.Errorf("after a change: %s\n%s", got.Header, got.body)
	}
	if now := a.do("GET", path, ""); !bytes.Equal(now.body, changed.body) {
		t.Errorf("the repeat changed it to %s", now.body)
	}
	a.want(204, a.do("DELETE", path, ""))
	var ids sync.Map
	var created atomic.Int32
	together(20, func(int) {
		got := repeat()
		ids.Store(a.task(got).ID, true)
		if got.Header.Get("Idempotency-Replayed") == "" {
			created.Add(1)
		}
	})
	all := maps.Collect(ids.Range)
	if len(all) != 1 || created.Load() != 1 || all[first.ID] != nil {
		t.Errorf("after %s was deleted, 20 repeats at once made %v, and %d say that theirs is new", first.ID, all, created.Load())
	}
}

// One request more than MaxInFlight is 503 at once. What is not about tasks is
// served all the same, and a client that does not read its response takes no
// place.
func TestMaxInFlight(t *testing.T) {
	t.Parallel()
	// Not through a pooler, whose two connections the waiting statements would take.
	a := newAPIOn(t, newDatabase(t), Options{MaxInFlight: 2, RequestTimeout: time.Minute})
	a.log.expected.Store(true)
	id := a.create(`{"title":"a"}`).ID
	release := make(chan struct{})
	var unread, waiting sync.WaitGroup
	defer unread.Wait()
	defer close(release)
	for range 25 {
		w := &stuckWriter{httptest.NewRecorder(), make(chan struct{}), release}
		unread.Go(func() { a.ServeHTTP(w, httptest.NewRequest("GET", "/api/tasks", nil)) })
		<-w.begun
		if w.Code != 200 {
			t.Fatalf("status %d while others do not read their responses", w.Code)
		}
	}
	unlock := lockTasks(t, a.dbURL, lockRow, id)
	for range 2 {
		waiting.Go(func() { a.want(200, a.do("PATCH", "/api/tasks/"+id+"/complete", "")) })
	}
	awaitQuery(t, a.db, "two waiting statements", "SELECT count(*) = 2 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'")
	for _, op := range operations(id) {
		a.expect("503", op.method, op.path, op.body)
	}
	for _, path := range []string{"/healthz", "/readyz", "/metrics", "/docs", "/openapi.json"} {
		a.expect("200", "GET", path, "")
	}
	unlock()
	waiting.Wait()
	a.expect("200", "GET", "/api/tasks", "")
}

// stuckWriter is a client that does not read its response until released.
type stuckWriter struct {
	*httptest.ResponseRecorder
	begun    chan struct{} // closed when the response begins
	released <-chan struct{}
}

func (w *stuckWriter) Write(b []byte) (int, error) {
	close(w.begun)
	<-w.released
	return len(b), nil
}

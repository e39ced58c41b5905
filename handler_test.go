package main

// handler_test.go is the contract as tables, through the real handler over real
// HTTP on a real PostgreSQL. Every answer that any test gets by [api.do] is also
// held against openapi.json.

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

// as returns a service that authenticates all requests as the user's.
func (a *api) as(user string) *api {
	b, opts := *a, a.opts
	opts.Authenticate = func(*http.Request) (string, error) { return user, nil }
	b.Handler = NewHandler(a.store, opts)
	b.slots = a.slots
	b.listen(b.Handler)
	return &b
}

// run runs a subtest that shares the service.
func (a *api) run(name string, f func(a *api)) {
	a.TB.(*testing.T).Run(name, func(t *testing.T) {
		b := *a
		b.TB = t
		f(&b)
	})
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

// detail returns what a problem document says.
func (a *api) detail(got *answer) string {
	a.Helper()
	return decode[problem](a, got).Detail
}

// elements returns the elements of a header field that is a list, in
// alphabetical order.
func elements(list string) string {
	elements := strings.Split(list, ", ")
	slices.Sort(elements)
	return strings.Join(elements, ", ")
}

// rawConn is a connection to the service for what net/http's client would not
// say, or not in this way.
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
type wish struct {
	method, path, body string
	want               int
}

// operations returns one request for each operation on tasks, on the task with
// the given id.
func operations(id string) []wish {
	return []wish{
		{"POST", "/api/tasks", `{"title": "a"}`, 201},
		{"GET", "/api/tasks", "", 200},
		{"GET", "/api/tasks/" + id, "", 200},
		{"PUT", "/api/tasks/" + id, `{"title": "a"}`, 200},
		{"PATCH", "/api/tasks/" + id, `{"title": "a"}`, 200},
		{"PATCH", "/api/tasks/" + id + "/complete", "", 200},
		{"DELETE", "/api/tasks/" + id, "", 204},
	}
}

// changes returns those that change a task.
func changes(id string) []wish { return operations(id)[3:] }

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
	execSQL(t, dbURL, `DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET timezone TO ''Asia/Kathmandu''', current_database()); END $$`)
	a := newAPIOn(t, dbURL, Options{})
	patterns := strings.NewReplacer(
		"ID", "[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}",
		"TIME", `[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,6})?Z`)
	for _, tt := range []struct{ name, body, want string }{
		{"the least", `{"title":"Buy milk"}`,
			`{"id":"ID","user_id":null,"title":"Buy milk","description":null,"completed":false,"version":1,"created_at":"TIME","updated_at":"TIME"}`},
		{"everything", ` { "completed" : true , "description" : "2 l" , "title" : "Buy milk" , "user_id" : "alice" } `,
			`{"id":"ID","user_id":"alice","title":"Buy milk","description":"2 l","completed":true,"version":1,"created_at":"TIME","updated_at":"TIME"}`},
		{"nulls", `{"title":"a","description":null,"user_id":null}`,
			`{"id":"ID","user_id":null,"title":"a","description":null,"completed":false,"version":1,"created_at":"TIME","updated_at":"TIME"}`},
		{"empty description", `{"title":"a","description":""}`,
			`{"id":"ID","user_id":null,"title":"a","description":"","completed":false,"version":1,"created_at":"TIME","updated_at":"TIME"}`},
		{"characters special to HTML", `{"title":"<a href='x'>&</a>"}`,
			`{"id":"ID","user_id":null,"title":"<a href='x'>&</a>","description":null,"completed":false,"version":1,"created_at":"TIME","updated_at":"TIME"}`},
		{"read-only members", `{"id":"x","version":null,"created_at":{},"updated_at":[[1e999]],"title":"a"}`,
			`{"id":"ID","user_id":null,"title":"a","description":null,"completed":false,"version":1,"created_at":"TIME","updated_at":"TIME"}`},
	} {
		a.run(tt.name, func(a *api) {
			begin := time.Now().Truncate(time.Microsecond)
			got := a.want(201, a.do("POST", "/api/tasks", tt.body))
			task := a.task(got)
			if want := patterns.Replace(regexp.QuoteMeta(tt.want)); !regexp.MustCompile("^" + want + "\n$").Match(got.body) {
				a.Errorf("got  %s\nwant %s", got.body, tt.want)
			}
			if !task.CreatedAt.Equal(task.UpdatedAt) || task.CreatedAt.Before(begin) || task.CreatedAt.After(time.Now()) {
				a.Errorf("created at %v, updated at %v, sent at %v", task.CreatedAt, task.UpdatedAt, begin)
			}
			if location := got.Header.Get("Location"); location != "/api/tasks/"+task.ID {
				a.Errorf("Location %q", location)
			}
			again := a.want(200, a.do("GET", "/api/tasks/"+task.ID, ""))
			if !bytes.Equal(again.body, got.body) || again.Header.Get("ETag") != `"1"` || got.Header.Get("ETag") != `"1"` {
				a.Errorf("created %s\n%s\nfetched %s\n%s", got.Header, got.body, again.Header, again.body)
			}
		})
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
	together(20, func(int) {
		for range 10 {
			a.create(`{"title":"a"}`)
		}
	})
	tasks := decode[[]Task](t, a.want(200, a.do("GET", "/api/tasks?limit=1000", "")))
	if len(tasks) != 230 || !slices.IsSortedFunc(tasks, func(a, b Task) int { return a.CreatedAt.Compare(b.CreatedAt) }) {
		t.Errorf("%d tasks, want 230 in the order of their creation", len(tasks))
	}
}

func TestUpdatedAt(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{})
	for _, tt := range []struct {
		name, last string // change, from now
		moves      bool
	}{
		{"after an hour", "-1 hour", true},
		{"after a change by a clock that was fast", "+1 hour", false},
	} {
		for _, op := range changes(a.create(`{"title":"a"}`).ID)[:3] {
			a.run(tt.name+": "+op.method, func(a *api) {
				if _, err := a.db.Exec("UPDATE tasks SET created_at = created_at - interval '2 hours', updated_at = now() + $1::interval", tt.last); err != nil {
					a.Fatal(err)
				}
				path := strings.TrimSuffix(op.path, "/complete")
				before := a.task(a.do("GET", path, ""))
				if same := a.task(a.do("PATCH", path, "{}")); same.UpdatedAt != before.UpdatedAt {
					a.Errorf("a patch of nothing moved updated_at from %v to %v", before.UpdatedAt, same.UpdatedAt)
				}
				after := a.task(a.do(op.method, op.path, op.body))
				if after.UpdatedAt.Before(before.UpdatedAt) || after.UpdatedAt.After(before.UpdatedAt) != tt.moves {
					a.Errorf("updated_at moved from %v to %v", before.UpdatedAt, after.UpdatedAt)
				}
				if after.CreatedAt != before.CreatedAt {
					a.Errorf("created_at moved from %v to %v", before.CreatedAt, after.CreatedAt)
				}
			})
		}
	}
}

func TestTextLimits(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{})
	id := a.create(`{"title":"a"}`).ID
	for member, limit := range map[string]int{"title": 200, "description": 10_000, "user_id": 255} {
		for _, character := range []string{"a", "e\u0301", "🙂"} {
			a.run(fmt.Sprintf("%s of %+q", member, character), func(a *api) {
				n := len([]rune(character))
				longest := strings.Repeat(character, limit/n) + strings.Repeat("-", limit%n)
				body := func(text string) string {
					members := map[string]string{"title": "a"}
					members[member] = text
					body, _ := json.Marshal(members)
					return string(body)
				}
				for _, op := range operations(id)[:5] {
					if op.body == "" || member == "user_id" && op.method != "POST" {
						continue
					}
					a.want(op.want, a.do(op.method, op.path, body(longest)))
					if got := a.outcome(a.do(op.method, op.path, body(longest+"-"))); got != "422 #/"+member {
						a.Errorf("%s of one more: %s", op.method, got)
					}
				}
			})
		}
	}
}

// Every code point that the contract allows comes back as it was sent.
func TestEveryCodePoint(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{})
	path := "/api/tasks/" + a.create(`{"title":"a"}`).ID
	var text strings.Builder
	for r, n := rune(1), 0; r <= 0x10FFFF; r++ {
		if r < 0xD800 || r > 0xDFFF {
			text.WriteRune(r)
			n++
		}
		if n == 10_000 || r == 0x10FFFF {
			var body bytes.Buffer
			enc := json.NewEncoder(&body)
			enc.SetEscapeHTML(false)
			enc.Encode(map[string]string{"description": text.String()})
			got := a.task(a.want(200, a.do("PATCH", path, body.String())))
			if *got.Description != text.String() {
				t.Errorf("the %d code points up to %U came back otherwise", n, r)
			}
			text.Reset()
			n = 0
		}
	}
}

// Any text comes back as it was sent, in every member, by every operation, and
// however it was escaped.
func TestRandomTexts(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{})
	rng := rand.New(rand.NewPCG(1, 2))
	for range 50 {
		owner, title, description := randomText(rng, 255), randomText(rng, 199)+"x", randomText(rng, 2000)
		members := fmt.Sprintf(`"description":%s,%s:%s`, escape(rng, description), escape(rng, "title"), escape(rng, title))
		created := a.want(201, a.do("POST", "/api/tasks", "{"+members+`,"user_id":`+escape(rng, owner)+"}"))
		path := "/api/tasks/" + a.task(created).ID + "?user_id=" + url.QueryEscape(owner)
		for _, got := range []*answer{
			created,
			a.do("GET", path, ""),
			a.do("PUT", path, "{"+members+"}"),
			a.do("PATCH", path, "{"+members+"}"),
			a.do("PATCH", strings.Replace(path, "?", "/complete?", 1), ""),
		} {
			if task := a.task(got); *task.UserID != owner || task.Title != title || *task.Description != description {
				t.Fatalf("sent %+q %+q %+q\ngot %s", owner, title, description, got.body)
			}
		}
		if page := decode[[]Task](t, a.do("GET", "/api/tasks?user_id="+url.QueryEscape(owner), "")); len(page) != 1 || *page[0].UserID != owner {
			t.Fatalf("of %+q: %+v", owner, page)
		}
	}
}

// randomText returns 1 to n code points, many of them of the difficult kinds.
func randomText(rng *rand.Rand, n int) string {
	difficult := []rune("\x01\b\t\n\f\r\x1f\"\\/<>&'\x7f\u0080\u0085\u00a0\u0301\u200d\u200e\u2028\u2029\ud7ff\ue000\ufeff\ufffd\ufffe\uffff\U00010000\U0001F600\U0010FFFF")
	text := make([]rune, 1+rng.IntN(n))
	for i := range text {
		switch rng.IntN(3) {
		case 0:
			text[i] = ' ' + rng.Int32N(95)
		case 1:
			text[i] = difficult[rng.IntN(len(difficult))]
		case 2:
			text[i] = 1 + rng.Int32N(0x10FFFF)
			if utf16.IsSurrogate(text[i]) {
				text[i] = 'é'
			}
		}
	}
	return string(text)
}

// escape returns text as a JSON string, each code point in one of the forms
// that JSON has for it.
func escape(rng *rand.Rand, text string) string {
	short := map[rune]string{'"': `\"`, '\\': `\\`, '/': `\/`, '\b': `\b`, '\f': `\f`, '\n': `\n`, '\r': `\r`, '\t': `\t`}
	b := []byte{'"'}
	for _, r := range text {
		switch form := rng.IntN(3); {
		case form == 0 && r >= ' ' && r != '"' && r != '\\':
			b = append(b, string(r)...)
		case form == 1 && short[r] != "":
			b = append(b, short[r]...)
		default:
			for _, unit := range utf16.Encode([]rune{r}) {
				b = fmt.Appendf(b, []string{`\u%04x`, `\u%04X`}[rng.IntN(2)], unit)
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
	for _, tt := range []struct{ name, method, path, body, want string }{
		{"get", "GET", "", "", `"old" "text" true v1`},
		{"replace everything", "PUT", "", everything, `"new" "more" false v2`},
		{"replace, with the least", "PUT", "", `{"title":"new"}`, `"new" null false v2`},
		{"replace, with null", "PUT", "", `{"title":"new","description":null,"completed":true}`, `"new" null true v2`},
		{"replace by the same", "PUT", "", `{"title":"old","description":"text","completed":true}`, `"old" "text" true v2`},
		{"replace, with read-only members", "PUT", "", `{"title":"new","user_id":"bob","id":1,"version":7,"created_at":"","updated_at":null}`, `"new" null false v2`},
		{"patch everything", "PATCH", "", everything, `"new" "more" false v2`},
		{"patch nothing", "PATCH", "", `{}`, `"old" "text" true v1`},
		{"patch only read-only members", "PATCH", "", `{"user_id":"bob","id":1,"version":7,"created_at":"","updated_at":null}`, `"old" "text" true v1`},
		{"patch the title", "PATCH", "", `{"title":"new"}`, `"new" "text" true v2`},
		{"patch the description", "PATCH", "", `{"description":"more"}`, `"old" "more" true v2`},
		{"patch the description to nothing", "PATCH", "", `{"description":""}`, `"old" "" true v2`},
		{"patch the description to null", "PATCH", "", `{"description":null}`, `"old" null true v2`},
		{"patch the completion", "PATCH", "", `{"completed":false}`, `"old" "text" false v2`},
		{"patch to the same", "PATCH", "", `{"completed":true}`, `"old" "text" true v2`},
		{"flip", "PATCH", "/complete", "", `"old" "text" false v2`},
		{"complete", "PATCH", "/complete", `{"completed":false}`, `"old" "text" false v2`},
		{"complete to the same", "PATCH", "/complete", `{"completed":true}`, `"old" "text" true v2`},
		{"complete, with read-only members", "PATCH", "/complete", `{"completed":false,"user_id":"bob","id":1,"version":7,"created_at":"","updated_at":null}`, `"old" "text" false v2`},
	} {
		a.run(tt.name, func(a *api) {
			before := a.create(`{"title":"old","description":"text","completed":true,"user_id":"alice"}`)
			got := a.want(200, a.do(tt.method, "/api/tasks/"+before.ID+tt.path, tt.body))
			after := a.task(got)
			if brief(after) != tt.want || after.ID != before.ID || *after.UserID != "alice" || after.CreatedAt != before.CreatedAt {
				a.Errorf("got %s, want %s", got.body, tt.want)
			}
			again := a.want(200, a.do("GET", "/api/tasks/"+before.ID, ""))
			if etag := fmt.Sprintf("%q", fmt.Sprint(after.Version)); !bytes.Equal(again.body, got.body) || got.Header.Get("ETag") != etag || again.Header.Get("ETag") != etag {
				a.Errorf("changed %s\n%s\nfetched %s\n%s", got.Header, got.body, again.Header, again.body)
			}
		})
	}
}

func TestFlips(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{})
	path := "/api/tasks/" + a.create(`{"title":"a"}`).ID + "/complete"
	for _, want := range []string{`"a" null true v2`, `"a" null false v3`, `"a" null true v4`} {
		if got := brief(a.task(a.want(200, a.do("PATCH", path, "")))); got != want {
			t.Errorf("got %s, want %s", got, want)
		}
	}
}

func TestDelete(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{})
	other := a.create(`{"title":"a"}`).ID
	path := "/api/tasks/" + a.create(`{"title":"a"}`).ID
	if got := a.want(204, a.do("DELETE", path, "")); len(got.body) > 0 {
		t.Errorf("the answer has the body %q", got.body)
	}
	for _, op := range operations(strings.TrimPrefix(path, "/api/tasks/"))[2:] {
		if got := a.outcome(a.do(op.method, op.path, op.body)); got != "404" {
			t.Errorf("then %s: %s", op.method, got)
		}
	}
	a.want(200, a.do("GET", "/api/tasks/"+other, ""))
}

// A trailing slash names the same resource in the API; all other paths are
// compared as they stand, but for percent-escapes within a segment.
func TestRouting(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{})
	id := a.create(`{"title":"a"}`).ID
	const collection, item, complete, page = "GET, HEAD, POST", "DELETE, GET, HEAD, PATCH, PUT", "PATCH", "GET, HEAD"
	for _, tt := range []struct{ method, path, want, allow string }{
		{"GET", "/api/tasks/", "200", ""},
		{"HEAD", "/api/tasks/", "200", ""},
		{"GET", "/api/tasks/?limit=1", "200", ""},
		{"GET", "/api/tasks?", "200", ""},
		{"GET", "/api/t%61sks", "200", ""},
		{"GET", "/api/tasks/" + id + "/", "200", ""},
		{"PATCH", "/api/tasks/" + id + "/complete/", "200", ""},

		{"PUT", "/api/tasks", "405", collection},
		{"PATCH", "/api/tasks", "405", collection},
		{"DELETE", "/api/tasks", "405", collection},
		{"DELETE", "/api/tasks/", "405", collection},
		{"OPTIONS", "/api/tasks", "405", collection},
		{"TRACE", "/api/tasks", "405", collection},
		{"CONNECT", "/api/tasks", "405", collection},
		{"PROPFIND", "/api/tasks", "405", collection},
		{"A!#$%&'*+-.^_`|~1", "/api/tasks", "405", collection},
		{"POST", "/api/tasks/" + id, "405", item},
		{"OPTIONS", "/api/tasks/" + id, "405", item},
		{"POST", "/api/tasks/nonsense", "405", item},
		{"GET", "/api/tasks/" + id + "/complete", "405", complete},
		{"HEAD", "/api/tasks/" + id + "/complete", "405", complete},
		{"PUT", "/api/tasks/" + id + "/complete", "405", complete},
		{"DELETE", "/api/tasks/" + id + "/complete", "405", complete},
		{"OPTIONS", "/api/tasks/" + id + "/complete", "405", complete},
		{"POST", "/", "405", page},
		{"POST", "/healthz", "405", page},
		{"DELETE", "/readyz", "405", page},
		{"PUT", "/openapi.json", "405", page},
		{"PATCH", "/docs", "405", page},
		{"OPTIONS", "/metrics", "405", page},

		{"GET", "//", "404", ""},
		{"POST", "//", "404", ""},
		{"GET", "/.", "404", ""},
		{"GET", "/./", "404", ""},
		{"GET", "/..", "404", ""},
		{"GET", "/x", "404", ""},
		{"GET", "/api", "404", ""},
		{"GET", "/api/", "404", ""},
		{"GET", "/API/TASKS", "404", ""},
		{"GET", "/api/task", "404", ""},
		{"GET", "//api/tasks", "404", ""},
		{"GET", "/api//tasks", "404", ""},
		{"POST", "/api//tasks", "404", ""},
		{"GET", "/api/tasks//", "404", ""},
		{"POST", "/api/tasks//", "404", ""},
		{"GET", "/api/tasks/.", "404", ""},
		{"GET", "/api/./tasks", "404", ""},
		{"GET", "/api/x/../tasks", "404", ""},
		{"GET", "/api/tasks/../tasks", "404", ""},
		{"DELETE", "/api/tasks/x/../" + id, "404", ""},
		{"GET", "/api/tasks/" + id + "//", "404", ""},
		{"GET", "/api/tasks/%2F", "404", ""},
		{"POST", "/api/tasks/%2F", "404", ""},
		{"PUT", "/api/tasks/" + id + "%2F", "404", ""},
		{"GET", "/%2F", "404", ""},
		{"GET", "/api/tasks//" + id, "404", ""},
		{"PATCH", "/api/tasks/" + id + "%2Fcomplete", "404", ""},
		{"PATCH", "/api/tasks/" + id + "//complete", "404", ""},
		{"PATCH", "/api/tasks//complete", "404", ""},
		{"PATCH", "/api/tasks/" + id + "/Complete", "404", ""},
		{"PATCH", "/api/tasks/" + id + "/complete/x", "404", ""},
		{"GET", "/api%2Ftasks", "404", ""},
		{"GET", "/healthz/", "404", ""},
		{"GET", "/docs/", "404", ""},
		{"GET", "/docs/index.html", "404", ""},
		{"GET", "/metrics/", "404", ""},
		{"GET", "/openapi.json/", "404", ""},
		{"HEAD", "/x", "404", ""},
		{"OPTIONS", "/x", "404", ""},
	} {
		a.run(tt.method+" "+tt.path, func(a *api) {
			got := a.do(tt.method, tt.path, "")
			allow := elements(got.Header.Get("Allow"))
			if outcome := a.outcome(got); outcome != tt.want || allow != tt.allow {
				a.Errorf("%s, Allow: %s; want %s, %s", outcome, allow, tt.want, tt.allow)
			}
		})
	}
	a.run("POST /api/tasks/", func(a *api) {
		a.want(201, a.do("POST", "/api/tasks/", `{"title":"a"}`))
	})
	// What net/http's client does not send.
	for request, want := range map[string]string{
		"OPTIONS *":                "404",
		"GET *":                    "404",
		"CONNECT /api/tasks":       "405",
		"post /api/tasks":          "405",
		"GET http://h/api/tasks":   "200",
		"GET http://h//api/tasks":  "404",
		"DELETE http://h/api/task": "404",
	} {
		a.run(request, func(a *api) {
			c := a.dial()
			c.send(request + " HTTP/1.1\r\nHost: h\r\n\r\n")
			if got := a.outcome(c.answer("GET")); got != want {
				a.Errorf("%s, want %s", got, want)
			}
		})
	}
}

func TestHead(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{})
	id := a.create(`{"title":"a"}`).ID
	a.create(`{"title":"b"}`)
	for _, tt := range []struct {
		path    string
		headers []string
		want    int
	}{
		{"/api/tasks", nil, 200},
		{"/api/tasks?limit=1", nil, 200}, // with Link
		{"/api/tasks?limit=0", nil, 422},
		{"/api/tasks/" + id, nil, 200},
		{"/api/tasks/" + id, []string{"If-None-Match", `"1"`}, 304},
		{"/api/tasks/" + noTask, nil, 404},
		{"/api/tasks/x", nil, 404},
		{"/x", nil, 404},
		{"/healthz", nil, 200},
		{"/readyz", nil, 200},
		{"/openapi.json", nil, 200},
		{"/docs", nil, 200},
		{"/", nil, 307},
	} {
		a.run(fmt.Sprint(tt.path, tt.headers), func(a *api) {
			get := a.want(tt.want, a.do("GET", tt.path, "", append(tt.headers, "X-Request-ID", "1")...))
			head := a.want(tt.want, a.do("HEAD", tt.path, "", append(tt.headers, "X-Request-ID", "1")...))
			for _, got := range []*answer{get, head} {
				got.Header.Del("Date")
				if got.Header.Get("Content-Length") == "0" {
					got.Header.Del("Content-Length") // as good as absent
				}
			}
			if got, want := fmt.Sprint(head.Header), fmt.Sprint(get.Header); got != want || len(head.body) > 0 {
				a.Errorf("got  %s and a body of %d bytes\nwant %s", got, len(head.body), want)
			}
		})
	}
}

func TestIDs(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{})
	id := a.create(`{"title":"a"}`).ID
	for _, tt := range []struct {
		name, id string
		uuid     bool
		want     int // 0: the operation's own
	}{
		{"as it is", id, true, 0},
		{"upper case", strings.ToUpper(id), true, 0},
		{"mixed case", strings.ToUpper(id[:19]) + id[19:], true, 0},
		{"of no task", noTask, true, 404},
		{"nil UUID", "00000000-0000-0000-0000-000000000000", true, 404},
		{"max UUID", "ffffffff-ffff-ffff-ffff-ffffffffffff", true, 404},
		{"a word", "tasks", false, 404},
		{"a number", "1", false, 404},
		{"null", "null", false, 404},
		{"too short", id[:35], false, 404},
		{"too long", id + "0", false, 404},
		{"no hyphens", strings.ReplaceAll(id, "-", ""), false, 404},
		{"hyphens elsewhere", id[1:] + id[:1], false, 404},
		{"other hyphens", strings.ReplaceAll(id, "-", "_"), false, 404},
		{"in braces", "%7B" + id + "%7D", false, 404},
		{"as a URN", "urn:uuid:" + id, false, 404},
		{"not hexadecimal", "g" + id[1:], false, 404},
		{"fullwidth digit", "%EF%BC%90" + id[3:], false, 404},
		{"white space", id[:35] + "%20", false, 404},
		{"more white space", "%20" + id, false, 404},
		{"sign", "%2B" + id[1:], false, 404},
		{"escaped slash", "%2F" + id[1:], false, 404},
		{"escaped dots", "%2E%2E", false, 404},
		{"U+0000", "%00", false, 404},
		{"invalid UTF-8", "%FF", false, 404},
		{"special to HTML", "%3C%26%3E", false, 404},
	} {
		a.run(tt.name, func(a *api) {
			for _, op := range operations(tt.id)[2:6] {
				got := a.want(cmp.Or(tt.want, op.want), a.do(op.method, op.path, op.body))
				if tt.want == 404 && strings.Contains(a.detail(got), "UUID") == tt.uuid {
					a.Errorf("%s: %s", op.method, got.body)
				}
				if tt.want == 0 && a.task(got).ID != id {
					a.Errorf("%s: got %s", op.method, got.body)
				}
			}
			if tt.want != 0 {
				a.want(tt.want, a.do("DELETE", "/api/tasks/"+tt.id, ""))
			}
		})
	}
	a.want(204, a.do("DELETE", "/api/tasks/"+strings.ToUpper(id), ""))
}

// §3 Ownership

func TestScope(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{})
	for _, tt := range []struct {
		name, owner string // of the task, as JSON
		query       string
		visible     bool
	}{
		{"alice's for alice", `"alice"`, "?user_id=alice", true},
		{"alice's for bob", `"alice"`, "?user_id=bob", false},
		{"alice's for Alice", `"alice"`, "?user_id=Alice", false},
		{"alice's for alice with a space", `"alice"`, "?user_id=alice+", false},
		{"alice's for everybody", `"alice"`, "", true},
		{"nobody's for alice", `null`, "?user_id=alice", false},
		{"nobody's for null", `null`, "?user_id=null", false},
		{"nobody's for everybody", `null`, "", true},
		{"a&b's for a&b", `"a&b"`, "?user_id=a%26b", true},
		{"a&b's for a", `"a&b"`, "?user_id=a", false},
	} {
		a.run(tt.name, func(a *api) {
			task := a.create(`{"title":"a","user_id":` + tt.owner + `}`)
			path := "/api/tasks/" + task.ID
			for _, op := range operations(task.ID)[2:] {
				if tt.visible {
					a.want(op.want, a.do(op.method, op.path+tt.query, op.body))
					continue
				}
				// Nothing tells it from a task that is not there.
				for _, match := range []string{"*", `"1"`, `"2"`} {
					got := a.do(op.method, op.path+tt.query, op.body, "If-Match", match, "X-Request-ID", "1")
					absent := a.do(op.method, strings.Replace(op.path, task.ID, noTask, 1)+tt.query, op.body, "If-Match", match, "X-Request-ID", "1")
					if a.outcome(got) != "404" || !bytes.Equal(got.body, absent.body) {
						a.Errorf("%s, If-Match: %s: got %s, of no task %s", op.method, match, got.body, absent.body)
					}
				}
			}
			if tt.visible {
				a.want(404, a.do("GET", path, "")) // deleted
			} else if now := a.task(a.want(200, a.do("GET", path, ""))); brief(now) != brief(task) {
				a.Errorf("it is now %s", brief(now))
			}
		})
	}
}

func TestOwnerOfNewTask(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{})
	const differs, forbidden = "422 #/user_id", "403"
	for _, tt := range []struct {
		name, user  string // verified
		query, body string
		want        string // owner or outcome
	}{
		{"nobody", "", "", `{"title":"a"}`, "null"},
		{"body", "", "", `{"title":"a","user_id":"alice"}`, `"alice"`},
		{"query", "", "?user_id=alice", `{"title":"a"}`, `"alice"`},
		{"query and null", "", "?user_id=alice", `{"title":"a","user_id":null}`, `"alice"`},
		{"query and the same", "", "?user_id=alice", `{"title":"a","user_id":"alice"}`, `"alice"`},
		{"query and another", "", "?user_id=alice", `{"title":"a","user_id":"bob"}`, differs},
		{"query and another, blank title", "", "?user_id=alice", `{"title":" ","user_id":"bob"}`, "422 #/title #/user_id"},
		{"verified", "alice", "", `{"title":"a"}`, `"alice"`},
		{"verified and null", "alice", "", `{"title":"a","user_id":null}`, `"alice"`},
		{"verified and the same", "alice", "?user_id=alice", `{"title":"a","user_id":"alice"}`, `"alice"`},
		{"verified and another in the query", "alice", "?user_id=bob", `{"title":"a"}`, forbidden},
		{"verified and another in the query and the body", "alice", "?user_id=bob", `{"title":"a","user_id":"bob"}`, forbidden},
		{"verified and another in the body", "alice", "", `{"title":"a","user_id":"bob"}`, forbidden},
		{"verified and another in the body, blank title", "alice", "", `{"title":" ","user_id":"bob"}`, forbidden},
		{"verified and an empty one in the body", "alice", "", `{"title":"a","user_id":""}`, forbidden},
	} {
		a.run(tt.name, func(a *api) {
			if tt.user != "" {
				a = a.as(tt.user)
			}
			got := a.do("POST", "/api/tasks"+tt.query, tt.body)
			outcome := a.outcome(got)
			if outcome == "201" {
				owner, _ := json.Marshal(a.task(got).UserID)
				outcome = string(owner)
			}
			if outcome != tt.want {
				a.Errorf("got %s, want %s", outcome, tt.want)
			}
		})
	}
}

func TestVerifiedUser(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{})
	const own, foreign, forbidden = "success", "404", "403"
	long := strings.Repeat("🙂", 255)
	for _, tt := range []struct{ name, user, owner, query, want string }{
		{"own", "alice", "alice", "", own},
		{"own, and says so", "alice", "alice", "?user_id=alice", own},
		{"own, and says otherwise", "alice", "alice", "?user_id=bob", forbidden},
		{"own, and says empty", "alice", "alice", "?user_id=", forbidden},
		{"own, of the longest name", long, long, "", own},
		{"another's", "alice", "bob", "", foreign},
		{"another's, and asks for it", "alice", "bob", "?user_id=bob", forbidden},
		{"empty", "", "alice", "", forbidden},
		{"empty, and says alice", "", "alice", "?user_id=alice", forbidden},
		{"empty, and says empty", "", "alice", "?user_id=", forbidden},
		{"too long", long + "🙂", "alice", "", forbidden},
		{"U+0000", "alice\x00", "alice", "", forbidden},
		{"invalid UTF-8", "alice\xff", "alice", "", forbidden},
	} {
		a.run(tt.name, func(a *api) {
			body, _ := json.Marshal(map[string]string{"title": "a", "user_id": tt.owner})
			task := a.create(string(body))
			user := a.as(tt.user)
			for _, op := range operations(task.ID) {
				want := tt.want
				if want == own || want == foreign && !strings.Contains(op.path, task.ID) {
					want = fmt.Sprint(op.want)
				}
				got := user.do(op.method, op.path+tt.query, op.body)
				if outcome := user.outcome(got); outcome != want {
					a.Errorf("%s %s: %s, want %s", op.method, op.path, outcome, want)
				}
				if op.method+op.path == "GET/api/tasks" && want == "200" {
					for _, task := range decode[[]Task](a, got) {
						if *task.UserID != tt.user {
							a.Errorf("lists %s's", *task.UserID)
						}
					}
				}
			}
			if tt.want == forbidden {
				a.want(200, a.do("GET", "/api/tasks/"+task.ID, "")) // is still there
			}
			user.want(200, user.do("GET", "/healthz", ""))
		})
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
	for _, tt := range []struct{ name, query, want string }{
		{"all", "", "a b c d f"},
		{"oldest first", "?sort=created_at", "a b c d f"},
		{"newest first", "?sort=-created_at", "f d c b a"},
		{"completed", "?completed=true", "b d f"},
		{"not completed", "?completed=false", "a c"},
		{"alice's", "?user_id=alice", "a d"},
		{"bob's", "?user_id=bob", "b"},
		{"carol's", "?user_id=carol", ""},
		{"null's", "?user_id=null", ""},
		{"alice's and completed", "?user_id=alice&completed=true", "d"},
		{"alice's, newest first", "?sort=-created_at&user_id=alice", "d a"},
		{"first", "?limit=1", "a"},
		{"last", "?limit=1&sort=-created_at", "f"},
		{"exactly all", "?limit=5", "a b c d f"},
		{"after", "?after=" + ids["b"], "c d f"},
		{"after, in upper case", "?after=" + strings.ToUpper(ids["b"]), "c d f"},
		{"before", "?sort=-created_at&after=" + ids["c"], "b a"},
		{"after a deleted task", "?after=" + ids["e"], "f"},
		{"before a deleted task", "?sort=-created_at&limit=2&after=" + ids["e"], "d c"},
		{"after no task ever", "?after=00000000-0000-0000-0000-000000000000", "a b c d f"},
		{"after the last", "?after=" + ids["f"], ""},
		{"after another's", "?user_id=alice&after=" + ids["b"], "d"},
		{"everything", "?after=" + ids["a"] + "&limit=1&sort=created_at&completed=true&user_id=alice", "d"},
		{"empty pairs", "?&limit=2&&", "a b"},
		{"escaped", "?%6Cimit=%32", "a b"},
	} {
		a.run(tt.name, func(a *api) {
			got := a.do("GET", "/api/tasks"+tt.query, "", "If-None-Match", "*", "If-Match", `"9"`)
			if titles := a.titles(got); titles != tt.want {
				a.Errorf("got %q, want %q", titles, tt.want)
			}
			if got.Header.Get("ETag") != "" || got.Header.Get("Cache-Control") != "no-cache" || got.body[0] != '[' {
				a.Errorf("%s\n%s", got.Header, got.body)
			}
		})
	}
	task := a.want(200, a.do("GET", "/api/tasks/"+ids["a"], "")).body
	if got := a.want(200, a.do("GET", "/api/tasks?limit=1", "")).body; string(got) != "["+strings.TrimSpace(string(task))+"]\n" {
		t.Errorf("the task is\n%s, on a page\n%s", task, got)
	}
}

func TestPageSize(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{})
	if _, err := a.db.Exec("INSERT INTO tasks (id, title) SELECT " + idOf("n") + ", 'a' FROM generate_series(1, 1001) n"); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		query string
		want  int
		more  bool
	}{
		{"", 100, true},
		{"?limit=1", 1, true},
		{"?limit=99", 99, true},
		{"?limit=1000", 1000, true},
		{"?limit=1000&after=00000000-0000-0000-0000-000000000000", 1000, true},
	} {
		got := a.want(200, a.do("GET", "/api/tasks"+tt.query, ""))
		if n, next := len(decode[[]Task](t, got)), a.next(got); n != tt.want || (next != "") != tt.more {
			t.Errorf("%s: %d tasks and then %q", tt.query, n, next)
		}
	}
	got := a.do("GET", a.next(a.do("GET", "/api/tasks?limit=1000", "")), "")
	if n, next := len(decode[[]Task](t, got)), a.next(got); n != 1 || next != "" {
		t.Errorf("last page: %d tasks and then %q", n, next)
	}
	if _, err := a.db.Exec("DELETE FROM tasks WHERE id = (SELECT id FROM tasks LIMIT 1)"); err != nil {
		t.Fatal(err)
	}
	if next := a.next(a.do("GET", "/api/tasks?limit=1000", "")); next != "" {
		t.Errorf("after a page with all: %q", next)
	}
}

// next repeats the other parameters, whatever they contain.
func TestNextRepeatsParameters(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{})
	for _, owner := range []string{"alice", "a&b", "a b", "a+b", "50%", "é<>\"'", "#?/=;,", "\n\x7f\u2028", "🙂", strings.Repeat("\U0010FFFF", 255)} {
		a.run(fmt.Sprintf("%.20q", owner), func(a *api) {
			body, _ := json.Marshal(map[string]any{"title": "a", "user_id": owner, "completed": true})
			for range 3 {
				a.create(string(body))
			}
			path := "/api/tasks?sort=-created_at&limit=2&completed=true&user_id=" + url.QueryEscape(owner)
			next := a.next(a.want(200, a.do("GET", path, "")))
			want, _ := url.Parse(path)
			got, err := url.Parse(next)
			if err != nil {
				a.Fatal(err)
			}
			query := got.Query()
			query.Del("after")
			if query.Encode() != want.Query().Encode() {
				a.Errorf("after %s comes %s", path, next)
			}
			a.want(200, a.do("GET", next, ""))
		})
	}
}

// Nor does it lose the owner behind more separators than net/url takes.
func TestNextRepeatsParametersOfLongQuery(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{})
	for range 2 {
		a.create(`{"title":"a","user_id":"alice"}`)
	}
	c := a.dial()
	c.send("GET /api/tasks?user_id=alice&limit=1" + strings.Repeat("&", 20_000) + " HTTP/1.1\r\nHost: h\r\n\r\n")
	if next := a.next(c.answer("GET")); !strings.Contains(next, "user_id=alice") || !strings.Contains(next, "limit=1") {
		t.Errorf("next is %q", next)
	}
}

// While tasks come and go, the one that next names among them, a walk yields
// each that stays exactly once.
func TestWalk(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{})
	for _, query := range []string{"?limit=1", "?limit=3", "?limit=3&sort=-created_at", "?limit=2&completed=true&user_id=alice", "?limit=2&completed=false&sort=-created_at"} {
		a.run(query, func(a *api) {
			if _, err := a.db.Exec("DELETE FROM tasks"); err != nil {
				a.Fatal(err)
			}
			completed := strings.Contains(query, "=true")
			body := fmt.Sprintf(`{"title":"stays","user_id":"alice","completed":%t}`, completed)
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
						a.Errorf("%s came twice", task.ID)
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
					a.Errorf("%s did not come", id)
				}
			}
		})
	}
}

// What is wrong with a query is refused by each operation, and named.
func TestQueries(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{})
	id := a.create(`{"title":"a"}`).ID
	for _, tt := range []struct{ query, every, list string }{ // "" is success
		{"?", "", ""},
		{"?user_id=" + strings.Repeat("%F0%9F%99%82", 255), "404", ""},
		{"?colour=red", "422 colour", "422 colour"},
		{"?User_id=alice", "422 User_id", "422 User_id"},
		{"?user_ID=alice", "422 user_ID", "422 user_ID"},
		{"?userid", "422 userid", "422 userid"},
		{"?user_id", "422 user_id", "422 user_id"},
		{"?user_id=", "422 user_id", "422 user_id"},
		{"?user_id=%00", "422 user_id", "422 user_id"},
		{"?user_id=%FF", "422 user_id", "422 user_id"},
		{"?user_id=\xff", "422 user_id", "422 user_id"},
		{"?user_id=%ED%A0%80", "422 user_id", "422 user_id"},
		{"?user_id=%zz", "422 user_id", "422 user_id"},
		{"?user_id=%", "422 user_id", "422 user_id"},
		{"?user_id=a;b", "422 user_id", "422 user_id"},
		{"?user_id=" + strings.Repeat("%F0%9F%99%82", 256), "422 user_id", "422 user_id"},
		{"?user_id=alice&user_id=alice", "422 user_id", "422 user_id"},
		{"?user_id=alice&user_id=bob", "422 user_id", "422 user_id"},
		{"?user_id=alice&user%5Fid=alice", "422 user_id", "422 user_id"},
		{"?user_id=alice&user_id=%zz", "422 user_id", "422 user_id"},
		{"?%zz=1", "422 %zz=1", "422 %zz=1"},
		{"?=1", "422 =1", "422 =1"},
		{"?a;b", "422 a;b", "422 a;b"},
		{"?limit=1", "422 limit", ""},
		{"?limit=1000", "422 limit", ""},
		{"?limit=0", "422 limit", "422 limit"},
		{"?limit=1001", "422 limit", "422 limit"},
		{"?limit=-1", "422 limit", "422 limit"},
		{"?limit=%2B1", "422 limit", "422 limit"},
		{"?limit=1.0", "422 limit", "422 limit"},
		{"?limit=1e2", "422 limit", "422 limit"},
		{"?limit=0x10", "422 limit", "422 limit"},
		{"?limit=1_0", "422 limit", "422 limit"},
		{"?limit=+1", "422 limit", "422 limit"},
		{"?limit=", "422 limit", "422 limit"},
		{"?limit", "422 limit", "422 limit"},
		{"?limit=ten", "422 limit", "422 limit"},
		{"?limit=65537", "422 limit", "422 limit"},
		{"?limit=18446744073709551617", "422 limit", "422 limit"},
		{"?completed=true", "422 completed", ""},
		{"?completed=1", "422 completed", "422 completed"},
		{"?completed=True", "422 completed", "422 completed"},
		{"?completed", "422 completed", "422 completed"},
		{"?sort=created_at", "422 sort", ""},
		{"?sort=title", "422 sort", "422 sort"},
		{"?sort=%2Bcreated_at", "422 sort", "422 sort"},
		{"?sort=-CREATED_AT", "422 sort", "422 sort"},
		{"?after=" + id, "422 after", ""},
		{"?after=", "422 after", "422 after"},
		{"?after=1", "422 after", "422 after"},
		{"?after=%7B" + id + "%7D", "422 after", "422 after"},
		{"?after=" + id + "&after=" + id, "422 after after", "422 after"},
		{"?colour=red&user_id=&completed=1&sort=title&limit=0&after=1",
			"422 after colour completed limit sort user_id", "422 after colour completed limit sort user_id"},
	} {
		a.run(fmt.Sprintf("%.40s", tt.query), func(a *api) {
			for _, op := range operations(id) {
				want := tt.every
				if op.method == "GET" && op.path == "/api/tasks" {
					want = tt.list
				}
				if want == "" || want == "404" && !strings.Contains(op.path, id) {
					want = fmt.Sprint(op.want)
				}
				if op.method == "DELETE" && want == "204" {
					continue
				}
				if got := a.outcome(a.do(op.method, op.path+tt.query, op.body)); got != want {
					a.Errorf("%s %s: %s, want %s", op.method, op.path, got, want)
				}
			}
		})
	}
}

// §5 Concurrency and retries

// precondition is a header field of entity tags, perhaps in several lines, and
// whether version 10 is among them by the strong and by the weak comparison.
type precondition struct {
	name         string
	lines        []string
	strong, weak bool
}

// header returns the field with the given name, for [api.do].
func (p precondition) header(name string) (header []string) {
	for _, line := range p.lines {
		header = append(header, name, line)
	}
	return header
}

func preconditions() []precondition {
	return []precondition{
		{"same", []string{`"10"`}, true, true},
		{"older", []string{`"9"`}, false, false},
		{"newer", []string{`"11"`}, false, false},
		{"prefix", []string{`"1"`}, false, false},
		{"longer", []string{`"100"`}, false, false},
		{"weak", []string{`W/"10"`}, false, true},
		{"weak in lower case", []string{`w/"10"`}, false, false},
		{"weak with a space", []string{`W/ "10"`}, false, false},
		{"any", []string{`*`}, true, true},
		{"any with white space", []string{" \t* "}, true, true},
		{"any as a tag", []string{`"*"`}, false, false},
		{"any in a list", []string{`*, "10"`}, false, false},
		{"any at the end of a list", []string{`"10", *`}, false, false},
		{"any and an empty element", []string{`*,`}, false, false},
		{"any twice", []string{`*, *`}, false, false},
		{"any and a tag in lines", []string{`*`, `"10"`}, false, false},
		{"any twice in lines", []string{`*`, `*`}, false, false},
		{"list", []string{`"1", "10", "9"`}, true, true},
		{"list without it", []string{`"1", "9"`}, false, false},
		{"list without white space", []string{`"9","10"`}, true, true},
		{"list with more white space", []string{"\"9\" \t , \t \"10\""}, true, true},
		{"list with empty elements", []string{`, ,"9",, "10" ,`}, true, true},
		{"list of weak and strong", []string{`W/"10", "10"`}, true, true},
		{"list of a strong other and weak", []string{`"9", W/"10"`}, false, true},
		{"list in lines", []string{`"9"`, `"10"`}, true, true},
		{"list in lines, one of them empty", []string{``, `"10"`}, true, true},
		{"list in lines, one of them malformed", []string{`10`, `"10"`}, false, false},
		{"long list", []string{strings.Repeat(`"7", `, 10_000) + `"10"`}, true, true},
		{"comma within a tag", []string{`"9,"10","`}, false, false},
		{"comma in another tag", []string{`"a,b", "10"`}, true, true},
		{"it within another tag", []string{`",10,"`}, false, false},
		{"empty tag", []string{`""`}, false, false},
		{"empty tag before it", []string{`"","10"`}, true, true},
		{"other bytes in a tag", []string{"\"\xff!#~\", \"10\""}, true, true},
		{"space in a tag", []string{`"1 0", "10"`}, false, false},
		{"leading zero", []string{`"010"`}, false, false},
		{"sign", []string{`"+10"`, `"-10"`}, false, false},
		{"space around", []string{`" 10 "`}, false, false},
		{"other numerals", []string{`"0xA", "1e1", "10.0", "１０"`}, false, false},
		{"huge", []string{`"9223372036854775807", "9223372036854775808", "184467440737095516160"`}, false, false},
		{"modulo 2^64", []string{`"18446744073709551626"`}, false, false},
		{"empty", []string{``}, false, false},
		{"only commas", []string{`,,`}, false, false},
		{"no quotes", []string{`10`}, false, false},
		{"other quotes", []string{`'10'`}, false, false},
		{"no end", []string{`"10`}, false, false},
		{"no beginning", []string{`10"`}, false, false},
		{"no comma", []string{`"9" "10"`}, false, false},
		{"rubbish behind", []string{`"10"x`}, false, false},
		{"rubbish in front", []string{`x"10"`}, false, false},
		{"rubbish in another element", []string{`"10", x`}, false, false},
		{"semicolon", []string{`"9"; "10"`}, false, false},
	}
}

// atVersion10 creates a task and makes its version 10.
func (a *api) atVersion10() Task {
	a.Helper()
	task := a.create(`{"title":"old"}`)
	if _, err := a.db.Exec("UPDATE tasks SET version = 10 WHERE id = $1", task.ID); err != nil {
		a.Fatal(err)
	}
	return task
}

func TestIfMatch(t *testing.T) {
	t.Parallel()
	testConditions(t, "If-Match", func(p precondition, op wish) string {
		if p.strong {
			return fmt.Sprint(op.want)
		}
		return "412"
	})
}

func TestIfNoneMatch(t *testing.T) {
	t.Parallel()
	testConditions(t, "If-None-Match", func(p precondition, op wish) string {
		switch {
		case !p.weak:
			return fmt.Sprint(op.want)
		case op.method == "GET" || op.method == "HEAD":
			return "304"
		}
		return "412"
	})
}

// testConditions tests a header field of entity tags on every operation on one
// task. want returns the outcome for a task at version 10.
func testConditions(t *testing.T, field string, want func(p precondition, op wish) string) {
	a := newAPI(t, Options{})
	for _, tt := range preconditions() {
		a.run(tt.name, func(a *api) {
			ops := append(operations("{id}")[2:], wish{"HEAD", "/api/tasks/{id}", "", 200}, wish{"PATCH", "/api/tasks/{id}", "{}", 200})
			for _, op := range ops {
				path := "/api/tasks/" + a.atVersion10().ID
				got := a.do(op.method, strings.Replace(op.path, "/api/tasks/{id}", path, 1), op.body, tt.header(field)...)
				want := want(tt, op)
				if outcome := a.outcome(got); outcome != want {
					a.Errorf("%s %s: %s, want %s", op.method, op.path, outcome, want)
				}
				if tag := got.Header.Get("ETag"); tag != `"10"` && (want == "304" || want == "200" && (op.method == "GET" || op.method == "HEAD" || op.body == "{}")) {
					a.Errorf("%s %s: ETag %s", op.method, op.path, tag)
				}
				if got := a.do("GET", path, ""); want == "412" && brief(a.task(got)) != `"old" null false v10` {
					a.Errorf("%s %s: 412, but it is now %s", op.method, op.path, got.body)
				}
				if got := a.outcome(a.do(op.method, strings.Replace(op.path, "{id}", noTask, 1), op.body, tt.header(field)...)); got != "404" {
					a.Errorf("%s of no task: %s", op.method, got)
				}
			}
		})
	}
	// Lists and creations ignore it.
	a.want(200, a.do("GET", "/api/tasks", "", field, `"1"`))
	a.want(201, a.do("POST", "/api/tasks", `{"title":"a"}`, field, "*"))
}

// If-Match comes first (RFC 9110 §13.2.2), and a tag that proxies have changed is
// told from the tag of another version.
func TestConditionsTogether(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{})
	id := a.create(`{"title":"a"}`).ID
	const send = `Send "<version>"`
	for _, tt := range []struct{ match, noneMatch, want, detail string }{
		{`"1"`, `"2"`, "200", ""},
		{`"1"`, `"1"`, "304", "another version"},
		{`"2"`, `"1"`, "412", "another version"},
		{`"2"`, "*", "412", "another version"},
		{`W/"1"`, "", "412", send},
		{`"1-gzip"`, "", "412", send},
		{`1`, "", "412", send},
		{``, "", "412", send},
		{`W/"1", "2"`, "", "412", "another version"},
	} {
		for _, op := range append(changes(id)[:2], wish{"GET", "/api/tasks/" + id, "", 200}) {
			headers := []string{"If-Match", tt.match}
			if tt.noneMatch != "" {
				headers = append(headers, "If-None-Match", tt.noneMatch)
			}
			want := tt.want
			if want == "304" && op.method != "GET" {
				want = "412"
			}
			got := a.do(op.method, op.path, op.body, headers...)
			if outcome := a.outcome(got); outcome != want || outcome == "412" && !strings.Contains(a.detail(got), tt.detail) {
				t.Errorf("%s, %q: %s, want %s: %s", op.method, headers, outcome, want, got.body)
			}
			a.exec("UPDATE tasks SET version = 1")
		}
	}
}

// Of many changes of the same version one wins.
func TestConcurrentUpdates(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{})
	for i := range 4 {
		id := a.create(`{"title":"old"}`).ID
		op := changes(id)[i]
		a.run(op.method+" "+strings.TrimPrefix(op.path, "/api/tasks/"+id), func(a *api) {
			var won atomic.Int32
			together(20, func(int) {
				got := a.do(op.method, op.path, op.body, "If-Match", `"1"`)
				if got.StatusCode == op.want {
					won.Add(1)
				} else if outcome := a.outcome(got); outcome != "412" && (outcome != "404" || op.method != "DELETE") {
					a.Error(outcome)
				}
			})
			if won.Load() != 1 {
				a.Errorf("%d of 20 won", won.Load())
			}
			if op.method != "DELETE" {
				if now := a.task(a.do("GET", "/api/tasks/"+id, "")); now.Version != 2 {
					a.Errorf("it is now %s", brief(now))
				}
			}
		})
	}
}

// Without If-Match every change counts, each as a whole.
func TestConcurrentChanges(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{})
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
			a.Errorf("replaced by %s: %s", want, brief(got))
		}
		got = a.task(a.want(200, a.do("PATCH", path, `{"completed":true}`)))
		if got.Title != *got.Description || !got.Completed {
			a.Errorf("patched: %s", brief(got))
		}
	})
	if now := a.task(a.do("GET", path, "")); now.Version != 61 {
		t.Errorf("after 60 changes it is %s", brief(now))
	}
}

func TestIdempotencyKey(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{})
	const created, replayed, reused = "created", "replayed", "422 Idempotency-Key"
	const first = `{"title":"a","description":"b","completed":true,"user_id":"alice"}`
	for i, tt := range []struct{ name, first, query, second, want string }{
		{"the same", first, "", first, replayed},
		{"other bytes, same values", first, "", ` { "user_id":"alice", "completed" : true, "d\u0065scription":"\u0062","title":"a" }`, replayed},
		{"owner in the query", first, "?user_id=alice", `{"title":"a","description":"b","completed":true}`, replayed},
		{"read-only members", first, "", `{"id":"x","version":7,"title":"a","description":"b","completed":true,"user_id":"alice"}`, replayed},
		{"another title", first, "", `{"title":"A","description":"b","completed":true,"user_id":"alice"}`, reused},
		{"another description", first, "", `{"title":"a","description":"","completed":true,"user_id":"alice"}`, reused},
		{"no description", first, "", `{"title":"a","completed":true,"user_id":"alice"}`, reused},
		{"another completion", first, "", `{"title":"a","description":"b","completed":false,"user_id":"alice"}`, reused},
		{"texts swapped", first, "", `{"title":"b","description":"a","completed":true,"user_id":"alice"}`, reused},
		{"another owner", first, "", `{"title":"a","description":"b","completed":true,"user_id":"bob"}`, created},
		{"no owner", first, "", `{"title":"a","description":"b","completed":true}`, created},
		{"an owner, first none", `{"title":"a"}`, "?user_id=alice", `{"title":"a"}`, created},
		{"no owner, twice", `{"title":"a"}`, "", `{"title":"a"}`, replayed},
		{"no owner, another title", `{"title":"a"}`, "", `{"title":"b"}`, reused},
		{"defaults written out", `{"title":"a"}`, "", `{"title":"a","description":null,"completed":false,"user_id":null}`, replayed},
		{"empty for null", `{"title":"a"}`, "", `{"title":"a","description":""}`, reused},
		{"canonically equivalent", `{"title":"é"}`, "", `{"title":"e\u0301"}`, reused},
		{"invalid", `{"title":"a"}`, "", `{"title":""}`, "422 #/title"},
	} {
		a.run(tt.name, func(a *api) {
			key := fmt.Sprintf("key-%d", i)
			one := a.want(201, a.do("POST", "/api/tasks", tt.first, "Idempotency-Key", key))
			two := a.do("POST", "/api/tasks"+tt.query, tt.second, "Idempotency-Key", key)
			outcome := a.outcome(two)
			if outcome == "201" {
				outcome = map[bool]string{false: created, true: replayed}[two.Header.Get("Idempotency-Replayed") == "true"]
			}
			if outcome != tt.want || one.Header.Get("Idempotency-Replayed") != "" {
				a.Errorf("%s, want %s: %s", outcome, tt.want, two.Header)
			}
			if same := one.Header.Get("Location") == two.Header.Get("Location"); same != (tt.want == replayed) || same && !bytes.Equal(one.body, two.body) {
				a.Errorf("first  %s\nsecond %s", one.body, two.body)
			}
		})
	}
}

func TestIdempotencyKeyLivesWithItsTask(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{})
	repeat := func() *answer {
		return a.want(201, a.do("POST", "/api/tasks", `{"title":"a"}`, "Idempotency-Key", "k"))
	}
	first := a.task(repeat())
	path := "/api/tasks/" + first.ID
	changed := a.want(200, a.do("PATCH", path, `{"title":"b"}`))
	if got := repeat(); !bytes.Equal(got.body, changed.body) || got.Header.Get("ETag") != `"2"` || got.Header.Get("Idempotency-Replayed") != "true" {
		t.Errorf("after a change: %s\n%s", got.Header, got.body)
	}
	if now := a.do("GET", path, ""); !bytes.Equal(now.body, changed.body) {
		t.Errorf("the repeat changed it to %s", now.body)
	}
	a.want(204, a.do("DELETE", path, ""))
	if got := repeat(); a.task(got).ID == first.ID || got.Header.Get("Idempotency-Replayed") != "" {
		t.Errorf("after the task was deleted: %s\n%s", got.Header, got.body)
	}

	var ids sync.Map
	var created atomic.Int32
	together(20, func(int) {
		got := a.want(201, a.do("POST", "/api/tasks", `{"title":"a"}`, "Idempotency-Key", "K"))
		ids.Store(a.task(got).ID, true)
		if got.Header.Get("Idempotency-Replayed") == "" {
			created.Add(1)
		}
	})
	n := 0
	for range ids.Range {
		n++
	}
	if n != 1 || created.Load() != 1 {
		t.Errorf("20 repeats at once made %d tasks, and %d say that theirs is new", n, created.Load())
	}
}

func TestIdempotencyKeyForm(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{})
	var visible []byte
	for c := byte('!'); c <= '~'; c++ {
		visible = append(visible, c)
	}
	for _, tt := range []struct {
		name, body string
		lines      []string
		want       string
	}{
		{"none", `{"title":"a"}`, nil, "201"},
		{"one character", `{"title":"a"}`, []string{"1"}, "201"},
		{"all visible characters", `{"title":"a"}`, []string{string(visible)}, "201"},
		{"longest", `{"title":"a"}`, []string{strings.Repeat("k", 255)}, "201"},
		{"too long", `{"title":"a"}`, []string{strings.Repeat("k", 256)}, "422 Idempotency-Key"},
		{"empty", `{"title":"a"}`, []string{""}, "422 Idempotency-Key"},
		{"space", `{"title":"a"}`, []string{"a b"}, "422 Idempotency-Key"},
		{"tab", `{"title":"a"}`, []string{"a\tb"}, "422 Idempotency-Key"},
		{"not ASCII", `{"title":"a"}`, []string{"é"}, "422 Idempotency-Key"},
		{"not UTF-8", `{"title":"a"}`, []string{"\x80"}, "422 Idempotency-Key"},
		{"twice", `{"title":"a"}`, []string{"a", "a"}, "422 Idempotency-Key"},
		{"twice, one empty", `{"title":"a"}`, []string{"", "a"}, "422 Idempotency-Key"},
		{"and the body", `{"title":"","colour":1}`, []string{""}, "422 #/colour #/title Idempotency-Key"},
		{"and a malformed body", `{"title":`, []string{""}, "400"},
	} {
		a.run(tt.name, func(a *api) {
			if got := a.outcome(a.do("POST", "/api/tasks", tt.body, precondition{lines: tt.lines}.header("Idempotency-Key")...)); got != tt.want {
				a.Errorf("got %s, want %s", got, tt.want)
			}
		})
	}
	// Keys are as they stand: quotes belong to them, and case counts.
	seen := map[string]bool{}
	for _, key := range []string{"key", "Key", `"key"`, "'key'", "key,", "key;a=b"} {
		seen[a.create(`{"title":"a"}`, "Idempotency-Key", key).ID] = true
	}
	if len(seen) != 6 {
		t.Errorf("6 keys made %d tasks", len(seen))
	}
	// Without one, a repeat is another task; on other operations it has no meaning.
	one, two := a.create(`{"title":"a"}`).ID, a.create(`{"title":"a"}`).ID
	if one == two {
		t.Error("one task of two requests without a key")
	}
	for _, op := range operations(one)[1:] {
		want := fmt.Sprint(op.want)
		if strings.HasSuffix(op.path, "/complete") {
			want = "422 Idempotency-Key" // a repeat would flip back
			a.want(200, a.do(op.method, op.path, `{"completed":true}`, "Idempotency-Key", "k"))
		}
		if got := a.outcome(a.do(op.method, op.path, op.body, "Idempotency-Key", "", "Idempotency-Key", " ")); got != want {
			t.Errorf("%s %s: %s, want %s", op.method, op.path, got, want)
		}
	}
}

// §6 Errors

func TestMalformedBodies(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{})
	id := a.create(`{"title":"a"}`).ID
	for _, tt := range []struct{ name, body string }{
		{"empty", ""}, // but see TestOperations for complete
		{"white space", " "},
		{"unfinished", `{"title":"a"`},
		{"unfinished string", `{"title":"a`},
		{"a second value", `{"title":"a"} {}`},
		{"rubbish behind", `{"title":"a"}x`},
		{"trailing comma", `{"title":"a",}`},
		{"no comma", `{"title":"a" "completed":true}`},
		{"no colon", `{"title" "a"}`},
		{"no quotes", `{title:"a"}`},
		{"other quotes", `{'title':'a'}`},
		{"comment", `{"title":"a"/**/}`},
		{"literal in another case", `{"title":"a","completed":True}`},
		{"NaN", `{"id":NaN,"title":"a"}`},
		{"leading zero", `{"version":01,"title":"a"}`},
		{"form", `title=a`},
		{"byte order mark", "\ufeff" + `{"title":"a"}`},
		{"other white space", "\u00a0" + `{"title":"a"}`},
		{"UTF-16", "{\x00\"\x00t\x00i\x00t\x00l\x00e\x00\"\x00:\x00\"\x00a\x00\"\x00}\x00"},
		{"control character", "{\"title\":\"a\nb\"}"},
		{"U+0000", "{\"title\":\"a\x00b\"}"},
		{"unknown escape", `{"title":"\x61"}`},
		{"short escape", `{"title":"\u061"}`},
		{"invalid UTF-8", "{\"title\":\"a\xff\"}"},
		{"invalid UTF-8 in a name", "{\"title\":\"a\",\"\xff\":1}"},
		{"invalid UTF-8 in what is ignored", "{\"title\":\"a\",\"id\":[\"\xff\"]}"},
		{"invalid UTF-8 outside", "{\"title\":\"a\"}\xff"},
		{"truncated UTF-8", "{\"title\":\"\xf0\x9f\x99\"}"},
		{"overlong UTF-8", "{\"title\":\"\xc0\xaf\"}"},
		{"surrogates in UTF-8", "{\"title\":\"\xed\xa0\xbd\xed\xb8\x80\"}"},
		{"over U+10FFFF", "{\"title\":\"\xf4\x90\x80\x80\"}"},
		{"high surrogate", `{"title":"\ud83d"}`},
		{"high surrogate, text", `{"title":"\ud83dx"}`},
		{"high surrogate, escape", `{"title":"\ud83d\n"}`},
		{"high surrogate, other escape", `{"title":"\ud83d\u0041"}`},
		{"two high surrogates", `{"title":"\ud83d\ud83d"}`},
		{"two high surrogates and a low one", `{"title":"\ud83d\ud83d\ude00"}`},
		{"low surrogate", `{"title":"\ude00"}`},
		{"pair in the wrong order", `{"title":"\uDE00\uD83D"}`},
		{"pair apart", `{"title":"\ud83d \ude00"}`},
		{"pair and a half", `{"title":"\ud83d\ude00\ude00"}`},
		{"surrogate behind a backslash", `{"title":"\\\ud83d"}`},
		{"surrogate in a name", `{"title":"a","\ud83d":1}`},
		{"surrogate in what is ignored", `{"title":"a","id":{"x":["\ud83d"]}}`},
		{"surrogate in a top-level string", `"\ud83d"`},
		{"member twice", `{"title":"a","title":"a"}`},
		{"member twice, by an escape", `{"title":"a","\u0074itle":"a"}`},
		{"member twice, by a pair", `{"title":"a","🙂":1,"\ud83d\ude42":1}`},
		{"member twice, one null", `{"title":"a","description":null,"description":"b"}`},
		{"unknown member twice", `{"title":"a","x":1,"x":1}`},
		{"empty member twice", `{"title":"a","":1,"":1}`},
		{"read-only member twice", `{"title":"a","id":1,"id":1}`},
		{"member twice, nested", `{"title":"a","id":{"x":1,"y":{},"x":1}}`},
		{"member twice, nested deeper", `{"title":"a","id":[{"x":[{"y":1,"y":1}]}]}`},
		{"member twice, in an array", `[{"x":1,"x":1}]`},
		{"nested too deep", `{"title":"a","id":` + strings.Repeat("[", 10_000) + strings.Repeat("]", 10_000) + `}`},
		{"nested too deep, unfinished", strings.Repeat(`{"":`, 20_000)},
	} {
		a.run(tt.name, func(a *api) {
			for _, op := range operations(id) {
				if op.body == "" && (tt.body == "" || op.method != "PATCH") {
					continue
				}
				if got := a.outcome(a.do(op.method, op.path, tt.body)); got != "400" {
					a.Errorf("%s %s: %s", op.method, op.path, got)
				}
			}
		})
	}
	// What comes close to it is well formed.
	for _, body := range []string{
		`{"title":"a","id":` + strings.Repeat("[", 9999) + strings.Repeat("]", 9999) + `}`,
		`{"title":"a","id":{"x":{"x":[{"x":1},{"x":1}]},"title":1}}`,
		`{"title":"\\ud83d","id":"\\\\u"}`,
		`{"title":"\ud83d\ude00\uFFFD\uD83D\uDE00"}`,
		"\t\r\n {\t\r\n \"title\"\t\r\n :\t\r\n \"a\"\t\r\n }\t\r\n ",
	} {
		a.create(body)
	}
}

func TestInvalidBodies(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{})
	id := a.create(`{"title":"a"}`).ID
	const title, description, completed, owner = "422 #/title", "422 #/description", "422 #/completed", "422 #/user_id"
	for _, tt := range []struct{ name, body, post, put, patch string }{ // "" is success
		{"array", `[]`, "422 #", "422 #", "422 #"},
		{"array of an object", `[{"title":"a"}]`, "422 #", "422 #", "422 #"},
		{"null", `null`, "422 #", "422 #", "422 #"},
		{"string", `"title"`, "422 #", "422 #", "422 #"},
		{"number", ` 1 `, "422 #", "422 #", "422 #"},
		{"boolean", `true`, "422 #", "422 #", "422 #"},
		{"empty object", `{}`, title, title, ""},

		{"title", `{"title":"a"}`, "", "", ""},
		{"title by escapes", `{"\u0074\u0069tle":"\u0061"}`, "", "", ""},
		{"title null", `{"title":null}`, title, title, title},
		{"title number", `{"title":1}`, title, title, title},
		{"title boolean", `{"title":true}`, title, title, title},
		{"title array", `{"title":["a"]}`, title, title, title},
		{"title object", `{"title":{"title":"a"}}`, title, title, title},
		{"title empty", `{"title":""}`, title, title, title},
		{"title of white space", `{"title":" \t\r\n\f\u000b\u0085\u00a0\u1680\u2000\u2028\u2029\u202f\u205f\u3000"}`, title, title, title},
		{"title invisible", `{"title":"\u200b\ufeff\u180e"}`, "", "", ""},
		{"title with white space", `{"title":"\u3000a "}`, "", "", ""},
		{"title with U+0000", `{"title":"a\u0000"}`, title, title, title},
		{"title of U+0000", `{"title":"\u0000"}`, title, title, title},
		{"title blank and too long", `{"title":"` + strings.Repeat(" ", 201) + `"}`, title + " #/title", title + " #/title", title + " #/title"},
		{"title in another case", `{"Title":"a"}`, "422 #/Title #/title", "422 #/Title #/title", "422 #/Title"},
		{"title in both cases", `{"title":"a","TITLE":"b"}`, "422 #/TITLE", "422 #/TITLE", "422 #/TITLE"},

		{"description null", `{"title":"a","description":null}`, "", "", ""},
		{"description blank", `{"title":"a","description":" "}`, "", "", ""},
		{"description number", `{"title":"a","description":1}`, description, description, description},
		{"description object", `{"title":"a","description":{}}`, description, description, description},
		{"description with U+0000", `{"title":"a","description":"\u0000"}`, description, description, description},
		{"description by case folding", `{"title":"a","de\u017fcription":"b"}`, "422 #/de%C5%BFcription", "422 #/de%C5%BFcription", "422 #/de%C5%BFcription"},

		{"completed null", `{"title":"a","completed":null}`, completed, completed, completed},
		{"completed number", `{"title":"a","completed":1}`, completed, completed, completed},
		{"completed string", `{"title":"a","completed":"true"}`, completed, completed, completed},
		{"completed array", `{"title":"a","completed":[true]}`, completed, completed, completed},

		{"user_id null", `{"title":"a","user_id":null}`, "", "", ""},
		{"user_id blank", `{"title":"a","user_id":" "}`, "", "", ""},
		{"user_id empty", `{"title":"a","user_id":""}`, owner, "", ""},
		{"user_id number", `{"title":"a","user_id":1}`, owner, "", ""},
		{"user_id with U+0000", `{"title":"a","user_id":"\u0000"}`, owner, "", ""},
		{"user_id in another case", `{"title":"a","user_Id":"b"}`, "422 #/user_Id", "422 #/user_Id", "422 #/user_Id"},

		{"read-only", `{"title":"a","id":1,"version":"x","created_at":null,"updated_at":[{}]}`, "", "", ""},
		{"read-only in another case", `{"title":"a","ID":1}`, "422 #/ID", "422 #/ID", "422 #/ID"},
		{"unknown", `{"title":"a","colour":"red"}`, "422 #/colour", "422 #/colour", "422 #/colour"},
		{"unknown null", `{"title":"a","colour":null}`, "422 #/colour", "422 #/colour", "422 #/colour"},
		{"empty name", `{"title":"a","":1}`, "422 #/", "422 #/", "422 #/"},
		{"internal", `{"title":"a","idempotency_key":"k"}`, "422 #/idempotency_key", "422 #/idempotency_key", "422 #/idempotency_key"},
		{"everything", `{"title":"","description":1,"completed":"no","user_id":0,"colour":1,"Colour":2,"":3}`,
			"422 #/ #/Colour #/colour #/completed #/description #/title #/user_id",
			"422 #/ #/Colour #/colour #/completed #/description #/title",
			"422 #/ #/Colour #/colour #/completed #/description #/title"},
		{"pointers", `{"title":"a","a/b":1,"m~n":1,"~1":1,"50%":1,"a b":1,"é":1,"#?\"\\^|":1,"/":1,"\u0000":1,"🙂":1}`,
			"422 #/%00 #/%23?%22%5C%5E%7C #/%C3%A9 #/%F0%9F%99%82 #/50%25 #/a%20b #/a~1b #/m~0n #/~01 #/~1",
			"422 #/%00 #/%23?%22%5C%5E%7C #/%C3%A9 #/%F0%9F%99%82 #/50%25 #/a%20b #/a~1b #/m~0n #/~01 #/~1",
			"422 #/%00 #/%23?%22%5C%5E%7C #/%C3%A9 #/%F0%9F%99%82 #/50%25 #/a%20b #/a~1b #/m~0n #/~01 #/~1"},
	} {
		a.run(tt.name, func(a *api) {
			wants := map[string]string{"POST": tt.post, "PUT": tt.put, "PATCH": tt.patch}
			for _, op := range operations(id) {
				if op.body == "" {
					continue
				}
				want := cmp.Or(wants[op.method], fmt.Sprint(op.want))
				if got := a.outcome(a.do(op.method, op.path, tt.body)); got != want {
					a.Errorf("%s: %s, want %s", op.method, got, want)
				}
			}
		})
	}
	for _, tt := range []struct{ body, want string }{
		{`{"completed":true}`, "200"},
		{`{"completed":false,"id":1,"user_id":{},"version":"x","created_at":null,"updated_at":[]}`, "200"},
		{`{}`, completed},
		{`{"version":1}`, completed},
		{`{"completed":null}`, completed},
		{`{"completed":"true"}`, completed},
		{`{"completed":1}`, completed},
		{`{"Completed":true}`, "422 #/Completed #/completed"},
		{`{"completed":true,"title":"a"}`, "422 #/title"},
		{`{"completed":0,"title":"a","description":null}`, "422 #/completed #/description #/title"},
		{`true`, "422 #"},
		{`null`, "422 #"},
	} {
		a.run("complete "+tt.body, func(a *api) {
			if got := a.outcome(a.do("PATCH", "/api/tasks/"+id+"/complete", tt.body)); got != tt.want {
				a.Errorf("got %s, want %s", got, tt.want)
			}
		})
	}
}

// A client may send back what it received, whole or changed.
func TestSendBack(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{})
	received := a.want(201, a.do("POST", "/api/tasks", `{"title":"a","description":"b","user_id":"alice"}`))
	path := "/api/tasks/" + a.task(received).ID
	for _, method := range []string{"PUT", "PATCH"} {
		got := a.task(a.want(200, a.do(method, path, strings.Replace(string(received.body), `"a"`, `"new"`, 1))))
		if brief(got) != fmt.Sprintf(`"new" "b" false v%d`, got.Version) || *got.UserID != "alice" {
			t.Errorf("%s: %s", method, brief(got))
		}
	}
	if another := a.create(string(received.body)); another.ID == a.task(received).ID || another.Version != 1 {
		t.Errorf("POST: %+v", another)
	}
}

// Nothing that anybody may send in place of a valid body makes the service fail.
func TestMutatedBodies(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{})
	ops := operations(a.create(`{"title":"a"}`).ID)
	ops = []wish{ops[0], ops[3], ops[4], ops[5]}
	bodies := []string{
		`{"title":"a","description":"b","completed":true,"user_id":"alice"}`,
		`{"title":"\ud83d\ude00\n\\","description":null,"completed":false,"id":[{"x":1e9}]}`,
		`{"completed":true,"version":7}`,
	}
	pieces := []string{`"`, `\`, `\u`, `\ud83d`, `\ude00`, `\u0000`, "\x00", "\xff", "\xed\xa0\x80", "\u2028", "🙂", `{`, `}`, `[`, `]`, `,`, `:`, ` `,
		`null`, `true`, `-0`, `1e999`, `""`, `{}`, `"title":`, `"user_id":""`, `"completed":false,`, `"":0,`, "\ufeff", strings.Repeat(" ", 300)}
	rng := rand.New(rand.NewPCG(3, 4))
	statuses := map[int]int{}
	for range 2000 {
		body := []byte(bodies[rng.IntN(len(bodies))])
		for range rng.IntN(4) {
			i := rng.IntN(len(body) + 1)
			j := min(len(body), i+rng.IntN(4))
			switch rng.IntN(4) {
			case 0:
				body = slices.Delete(body, i, j)
			case 1:
				body = slices.Insert(body, i, body[i:j]...)
			case 2:
				body = slices.Insert(body, i, []byte(pieces[rng.IntN(len(pieces))])...)
			case 3:
				body = slices.Replace(body, i, j, byte(rng.Int()))
			}
		}
		op := ops[rng.IntN(len(ops))]
		got := a.do(op.method, op.path, string(body))
		statuses[got.StatusCode]++
		if got.StatusCode != op.want && got.StatusCode != 400 && got.StatusCode != 422 {
			t.Errorf("%s %s %q: %s", op.method, op.path, body, got.Status)
		}
	}
	if statuses[200] < 100 || statuses[201] < 50 || statuses[400] < 100 || statuses[422] < 100 {
		t.Errorf("the bodies are not as mixed as they should be: %v", statuses)
	}
}

// The largest legal task fits, however it is escaped.
func TestLargestTask(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{})
	escaped := func(text string) string {
		var b strings.Builder
		for _, unit := range utf16.Encode([]rune(text)) {
			fmt.Fprintf(&b, `\u%04x`, unit)
		}
		return `"` + b.String() + `"`
	}
	body := "{"
	for member, n := range map[string]int{"title": 200, "description": 10_000, "user_id": 255} {
		body += escaped(member) + ":" + escaped(strings.Repeat("\U0010FFFF", n)) + ","
	}
	task := a.create(body + escaped("completed") + ":false}")
	path := "/api/tasks/" + task.ID
	back := a.want(200, a.do("GET", path, "")).body
	for _, method := range []string{"PUT", "PATCH"} {
		a.want(200, a.do(method, path, body+escaped("completed")+":true}"))
		a.want(200, a.do(method, path, string(back)))
	}
}

func TestBodySize(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{})
	id := a.create(`{"title":"a"}`).ID
	const limit = 128 << 10
	for _, op := range operations(id) {
		if op.method == "GET" || op.method == "DELETE" {
			continue
		}
		body := strings.TrimSuffix(cmp.Or(op.body, `{"completed":true}`), "}")
		body += strings.Repeat(" ", limit-len(body)-1) + "}"
		head := op.method + " " + op.path + " HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\n"
		a.run(op.method+" "+op.path, func(a *api) {
			a.want(op.want, a.do(op.method, op.path, body))
			if got := a.outcome(a.do(op.method, op.path, body+" ")); got != "413" {
				a.Errorf("one byte more: %s", got)
			}
			c := a.dial()
			c.send(head + fmt.Sprintf("Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n", limit, body))
			if got := a.outcome(c.answer(op.method)); got != fmt.Sprint(op.want) {
				a.Errorf("in a chunk: %s", got)
			}
			// The answers below come although the bodies have no end.
			c.send(head + fmt.Sprintf("Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n2\r\n ", limit, body))
			if got := c.answer(op.method); a.outcome(got) != "413" || !got.Close {
				a.Errorf("in a chunk, one byte more: %s %s", got.Status, got.Header)
			}
			c = a.dial()
			c.send(head + fmt.Sprintf("Content-Length: %d\r\nExpect: 100-continue\r\n\r\n", limit+1))
			if got := c.answer(op.method); a.outcome(got) != "413" || !got.Close {
				a.Errorf("of which nothing was sent: %s %s", got.Status, got.Header)
			}
			c = a.dial()
			c.send(head + fmt.Sprintf("Content-Length: %d\r\n\r\n", int64(1)<<60))
			if got := c.answer(op.method); a.outcome(got) != "413" || !got.Close {
				a.Errorf("of a huge length: %s %s", got.Status, got.Header)
			}
		})
	}
}

// A user_id of another type is that, and no other user's.
func TestUserIDType(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{})
	for _, query := range []string{"", "?user_id=alice"} {
		if got := a.outcome(a.do("POST", "/api/tasks"+query, `{"title":"a","user_id":5}`)); got != "422 #/user_id" {
			t.Errorf("%q: %s", query, got)
		}
	}
}

// Who sends the whole of a body before reading the answer gets it, be it about
// something else and the end of the connection asked for.
func TestAnswerBeforeBody(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{})
	for _, tt := range []struct{ method, path, want string }{
		{"POST", "/api/tasks", "413"}, {"POST", "/nope", "404"}, {"PUT", "/healthz", "405"},
	} {
		for range 20 {
			c := a.dial()
			c.send(tt.method + " " + tt.path + " HTTP/1.1\r\nHost: h\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: 1000000\r\n\r\n")
			if _, err := io.WriteString(c, strings.Repeat(" ", 1_000_000)); err != nil {
				t.Errorf("%s %s: %v", tt.method, tt.path, err)
				continue
			}
			if got := a.outcome(c.answer(tt.method)); got != tt.want {
				t.Errorf("%s %s: %s, want %s", tt.method, tt.path, got, tt.want)
			}
		}
	}
}

// A body that does not come is answered, and occupies no slot meanwhile.
func TestSlowBody(t *testing.T) {
	t.Parallel()
	const head = "POST /api/tasks HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\n"
	for _, tt := range []struct {
		name string
		send func(a *api, c *rawConn)
		want string
	}{
		{"stays away", func(a *api, c *rawConn) {
			c.send(head + "Content-Length: 13\r\nExpect: 100-continue\r\n\r\n")
			if got := c.answer("POST"); got.StatusCode != 100 {
				a.Error(got.Status)
			}
			a.create(`{"title":"a"}`) // meanwhile
		}, "408"},
		{"stops", func(_ *api, c *rawConn) { c.send(head + "Content-Length: 13\r\n\r\n{\"title\":") }, "408"},
		{"stops in a chunk", func(_ *api, c *rawConn) { c.send(head + "Transfer-Encoding: chunked\r\n\r\n5\r\n{\"tit") }, "408"},
		{"stops between chunks", func(_ *api, c *rawConn) { c.send(head + "Transfer-Encoding: chunked\r\n\r\n5\r\n{\"tit\r\n") }, "408"},
		{"comes too late to be served", func(_ *api, c *rawConn) {
			c.send(head + "Content-Length: 13\r\n\r\n{\"title\":\"a\"")
			time.Sleep(2800 * time.Millisecond) // and 200 are left
			c.send("}")
		}, "408"},
		{"breaks off", func(_ *api, c *rawConn) {
			c.send(head + "Content-Length: 13\r\n\r\n{\"title\":")
			c.Conn.(*net.TCPConn).CloseWrite()
		}, "499"},
		{"is not in chunks", func(_ *api, c *rawConn) { c.send(head + "Transfer-Encoding: chunked\r\n\r\nx\r\n") }, "400"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			a := newAPI(t, Options{RequestTimeout: 3 * time.Second, MaxInFlight: 1})
			c := a.dial()
			tt.send(a, c)
			if got := c.answer("POST"); a.outcome(got) != tt.want || !got.Close {
				t.Errorf("%s %s", got.Status, got.Header)
			}
		})
	}
}

func TestMediaTypes(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{})
	id := a.create(`{"title":"a"}`).ID
	const all, merge, none = "all", "merge", "none"
	for contentType, accepted := range map[string]string{
		"application/json":                            all,
		"application/json; charset=utf-8":             all,
		"application/json;charset=latin1":             all,
		"application/json ; x=\"a;b\"":                all,
		"Application/JSON":                            all,
		"application/merge-patch+json":                merge,
		"APPLICATION/Merge-Patch+JSON; charset=utf-8": merge,
		"":                                  none,
		"text/plain":                        none,
		"text/json":                         none,
		"application/jsonp":                 none,
		"application/json-patch+json":       none,
		"application/problem+json":          none,
		"application/x-www-form-urlencoded": none,
		"multipart/form-data; boundary=x":   none,
		"application/json, text/plain":      none,
		"text/plain; application/json":      none,
		"application /json":                 none,
		"application/*":                     none,
		"*/*":                               none,
		"application":                       none,
		"; charset=utf-8":                   none,
	} {
		a.run(contentType, func(a *api) {
			for _, op := range operations(id) {
				if op.method == "GET" || op.method == "DELETE" {
					continue
				}
				got := a.do(op.method, op.path, cmp.Or(op.body, `{"completed":true}`), "Content-Type", contentType)
				want := map[bool]int{false: 415, true: op.want}[accepted == all || accepted == merge && op.method == "PATCH"]
				if a.outcome(got) != fmt.Sprint(want) {
					a.Errorf("%s %s: %s, want %d", op.method, op.path, got.Status, want)
				}
				for name, method := range map[string]string{"Accept-Post": "POST", "Accept": "PUT", "Accept-Patch": "PATCH"} {
					offer := map[string]string{"PATCH": "application/merge-patch+json, application/json"}[method]
					offer = cmp.Or(offer, "application/json")
					if want != 415 || method != op.method {
						offer = ""
					}
					if got := got.Header.Get(name); got != offer {
						a.Errorf("%s %s: %s is %q, want %q", op.method, op.path, name, got, offer)
					}
				}
			}
		})
	}
	// No body needs no type, and an operation without one does not look at it.
	for _, op := range operations(id) {
		want := fmt.Sprint(op.want)
		if op.body != "" {
			want = "400"
		}
		if got := a.outcome(a.do(op.method, op.path, "", "Content-Type", "text/plain")); got != want {
			t.Errorf("%s %s without a body: %s, want %s", op.method, op.path, got, want)
		}
	}
	c := a.dial()
	c.send("PATCH /api/tasks/" + a.create(`{"title":"a"}`).ID + "/complete HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n")
	if got := c.answer("PATCH"); a.outcome(got) != "200" || !a.task(got).Completed || got.Close {
		t.Errorf("an empty chunked body: %s %s", got.Status, got.body)
	}
}

// Of two rules that a request breaks, the first is told.
func TestOrderOfChecks(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{MaxInFlight: 1})
	a.log.expected.Store(true)
	id := a.create(`{"title":"a","user_id":"alice"}`).ID
	foreign := []string{"Sec-Fetch-Site", "cross-site"}
	plain := []string{"Content-Type", "text/plain"}
	large := strings.Repeat(" ", 128<<10+1)
	const task, blank = "/api/tasks/", `{"title":" "}`
	for _, tt := range []struct {
		name, user   string
		full         bool // no slot is free
		method, path string
		body         string
		headers      []string
		want         string
	}{
		{"path before method", "", false, "DELETE", "/nowhere", "", nil, "404"},
		{"path before origin", "", false, "POST", "/nowhere", "", foreign, "404"},
		{"path before limit", "", true, "GET", "/nowhere", "", nil, "404"},
		{"method before origin", "", false, "DELETE", "/api/tasks", "", foreign, "405"},
		{"method before limit", "", true, "DELETE", "/api/tasks", "", nil, "405"},
		{"method before query", "", false, "POST", task + id + "?colour=1", "", nil, "405"},
		{"method before id", "", false, "POST", task + "x", "", nil, "405"},
		{"origin before limit", "", true, "POST", "/api/tasks", `{"title":"a"}`, foreign, "403"},
		{"origin before query", "", false, "POST", "/api/tasks?colour=1", `{"title":"a"}`, foreign, "403"},
		{"origin before id", "", false, "DELETE", task + "x", "", foreign, "403"},
		{"origin before size", "", false, "POST", "/api/tasks", large, foreign, "403"},
		{"limit before scope", "alice", true, "GET", "/api/tasks?user_id=bob", "", nil, "503"},
		{"limit before query", "", true, "GET", "/api/tasks?colour=1", "", nil, "503"},
		{"limit before id", "", true, "GET", task + "x", "", nil, "503"},
		{"limit before media type", "", true, "PUT", task + id, blank, plain, "503"},
		{"limit before size", "", true, "PUT", task + id, large, nil, "503"},
		{"limit before form", "", true, "PUT", task + id, "{", nil, "503"},
		{"scope before query", "alice", false, "GET", "/api/tasks?colour=1&user_id=bob", "", nil, "403"},
		{"scope before id", "alice", false, "GET", task + "x?user_id=bob", "", nil, "403"},
		{"scope before media type", "alice", false, "PUT", task + id + "?user_id=bob", blank, plain, "403"},
		{"scope before form", "alice", false, "POST", "/api/tasks?user_id=bob", "{", nil, "403"},
		{"scope before rules", "alice", false, "POST", "/api/tasks", `{"title":" ","user_id":"bob"}`, nil, "403"},
		{"query before id", "", false, "GET", task + "x?colour=1", "", nil, "422 colour"},
		{"query before media type", "", false, "PUT", task + id + "?colour=1", blank, plain, "422 colour"},
		{"query before size", "", false, "PUT", task + id + "?colour=1", large, nil, "422 colour"},
		{"query before form", "", false, "PUT", task + id + "?colour=1", "{", nil, "422 colour"},
		{"query before rules", "", false, "PUT", task + id + "?colour=1", blank, nil, "422 colour"},
		{"query before absence", "", false, "GET", task + noTask + "?colour=1", "", nil, "422 colour"},
		{"id before media type", "", false, "PUT", task + "x", blank, plain, "404"},
		{"id before size", "", false, "PUT", task + "x", large, nil, "404"},
		{"id before form", "", false, "PUT", task + "x", "{", nil, "404"},
		{"id before rules", "", false, "PUT", task + "x", blank, nil, "404"},
		{"media type before size", "", false, "PUT", task + id, large, plain, "415"},
		{"media type before form", "", false, "PUT", task + id, "{", plain, "415"},
		{"media type before rules", "", false, "PUT", task + id, blank, plain, "415"},
		{"media type before absence", "", false, "PUT", task + noTask, `{"title":"a"}`, plain, "415"},
		{"size before form", "", false, "PUT", task + id, large + "{", nil, "413"},
		{"size before absence", "", false, "PUT", task + noTask, large, nil, "413"},
		{"form before rules", "", false, "PUT", task + id, `{"title":1,"title":2}`, nil, "400"},
		{"form before rules of the whole", "", false, "PUT", task + id, `[{"x":1,"x":2}]`, nil, "400"},
		{"form before absence", "", false, "PUT", task + noTask, "{", nil, "400"},
		{"rules before absence", "", false, "PUT", task + noTask, blank, nil, "422 #/title"},
		{"rules before version", "", false, "PUT", task + id, blank, []string{"If-Match", `"9"`}, "422 #/title"},
		{"absence before version", "", false, "PUT", task + noTask, `{"title":"a"}`, []string{"If-Match", `"9"`}, "404"},
		{"owner before version", "", false, "PUT", task + id + "?user_id=bob", `{"title":"a"}`, []string{"If-Match", `"9"`}, "404"},
	} {
		a.run(tt.name, func(a *api) {
			if tt.user != "" {
				a = a.as(tt.user)
			}
			if tt.full {
				select {
				case a.slots <- struct{}{}:
					defer func() { <-a.slots }()
				default:
					a.Fatal("a request has not given its slot back")
				}
			}
			if got := a.outcome(a.do(tt.method, tt.path, tt.body, tt.headers...)); got != tt.want {
				a.Errorf("got %s, want %s", got, tt.want)
			}
		})
	}
	if now := brief(a.task(a.do("GET", task+id, ""))); now != `"a" null false v1` {
		t.Errorf("something of this changed it to %s", now)
	}
}

// One request more than MaxInFlight is 503 at once. What is not about tasks is
// served all the same.
func TestMaxInFlight(t *testing.T) {
	t.Parallel()
	// Not through a pooler, whose two connections the waiting statements would take.
	a := newAPIOn(t, newDatabase(t), Options{MaxInFlight: 2, RequestTimeout: time.Minute})
	a.log.expected.Store(true)
	id := a.create(`{"title":"a"}`).ID
	tx, err := a.db.Begin()
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback()
	if _, err := tx.Exec("SELECT FROM tasks FOR UPDATE"); err != nil {
		t.Fatal(err)
	}
	var waiting sync.WaitGroup
	for range 2 {
		waiting.Go(func() { a.want(200, a.do("PATCH", "/api/tasks/"+id+"/complete", "")) })
	}
	awaitQuery(t, a.db, "two waiting statements", "SELECT count(*) = 2 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'")
	for _, op := range operations(id) {
		if got := a.outcome(a.do(op.method, op.path, op.body)); got != "503" {
			t.Errorf("%s %s: %s", op.method, op.path, got)
		}
	}
	for _, path := range []string{"/healthz", "/readyz", "/metrics", "/docs", "/openapi.json"} {
		a.want(200, a.do("GET", path, ""))
	}
	if err := tx.Rollback(); err != nil {
		t.Fatal(err)
	}
	waiting.Wait()
	a.want(200, a.do("GET", "/api/tasks", ""))
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

// A defect is 500, of which the client learns nothing and the log the cause.
func TestDefect(t *testing.T) {
	t.Parallel()
	const secret, origin = "do-not-tell", "https://app.example"
	for _, tt := range []struct {
		name string
		make func(a *api)
		log  string
	}{
		{"panic", func(a *api) { a.store = &Store{} }, "nil pointer dereference"},
		{"constraint unknown to the service", func(a *api) { a.exec("ALTER TABLE tasks ADD CONSTRAINT strange CHECK (false) NOT VALID") }, "strange"},
		{"another schema", func(a *api) { a.exec("ALTER TABLE tasks RENAME description TO summary") }, "description"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			a := newAPI(t, Options{CORSOrigins: []string{origin}, MaxInFlight: 1})
			a.log.expected.Store(true)
			tt.make(a)
			for range 2 { // the first gives its slot back
				got := a.do("POST", "/api/tasks", `{"title":"`+secret+`"}`, "Origin", origin, "X-Request-ID", "r-1")
				if a.outcome(got) != "500" || got.Header.Get("X-Request-ID") != "r-1" || got.Header.Get("Access-Control-Allow-Origin") != origin {
					t.Errorf("%s\n%s", got.Header, got.body)
				}
				if strings.Contains(string(got.body), tt.log) || strings.Contains(string(got.body), secret) {
					t.Errorf("disclosed: %s", got.body)
				}
			}
			a.want(200, a.do("GET", "/healthz", ""))
			a.server.Close() // waits for the log
			log := a.log.String()
			if lines := strings.Count(log, "level=ERROR msg=request method=POST route=/api/tasks status=500 "); lines != 2 || strings.Count(log, "request_id=r-1 error=") != 2 ||
				strings.Count(log, tt.log) < 2 || strings.Contains(log, secret) {
				t.Errorf("logged:\n%s", log)
			}
		})
	}
}

// exec runs a statement.
func (a *api) exec(statement string) {
	a.Helper()
	if _, err := a.db.Exec(statement); err != nil {
		a.Fatalf("%s: %v", statement, err)
	}
}

func TestRequestID(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{})
	seen := map[string]bool{}
	for _, tt := range []struct {
		name, id string
		kept     bool
	}{
		{"absent", "", false},
		{"good", "checkout-4711", true},
		{"every character", "ABCDEFGHIJKLMNOPQRSTUVWXYZ.abcdefghijklmnopqrstuvwxyz_0123456789-", true},
		{"one character", "-", true},
		{"longest", strings.Repeat("x", 128), true},
		{"too long", strings.Repeat("x", 129), false},
		{"space", "a b", false},
		{"as gateways make them", "Root=1-67891233-abcdef012345678912345678#a/b+c:d", true},
		{"quotes", `"a"`, true},
		{"not ASCII", "é", false},
		{"not UTF-8", "a\xff", false},
		{"line separator", "a\u2028b", false},
	} {
		a.run(tt.name, func(a *api) {
			var header []string
			if tt.id != "" {
				header = []string{"X-Request-ID", tt.id}
			}
			for _, path := range []string{"/healthz", "/api/tasks", "/api/tasks/x", "/nowhere", "/"} {
				got := a.do("GET", path, "", header...).Header.Get("X-Request-ID")
				if !regexp.MustCompile(`^[!-~]{1,128}$`).MatchString(got) || (got == tt.id) != tt.kept || !tt.kept && seen[got] {
					a.Errorf("%s: %q", path, got)
				}
				seen[got] = true
			}
		})
	}
}

// Problems are compared in every respect by [api.outcome].
func TestHeaders(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{})
	id := a.create(`{"title":"a"}`).ID
	const json = "application/json"
	for _, tt := range []struct{ name, method, path, body, ifNoneMatch, mediaType, cache string }{
		{"create", "POST", "/api/tasks", `{"title":"a"}`, "", json, "no-cache"},
		{"list", "GET", "/api/tasks", "", "", json, "no-cache"},
		{"get", "GET", "/api/tasks/" + id, "", "", json, "no-cache"},
		{"not modified", "GET", "/api/tasks/" + id, "", "*", "", "no-cache"},
		{"replace", "PUT", "/api/tasks/" + id, `{"title":"a"}`, "", json, "no-cache"},
		{"patch", "PATCH", "/api/tasks/" + id, `{}`, "", json, "no-cache"},
		{"complete", "PATCH", "/api/tasks/" + id + "/complete", "", "", json, "no-cache"},
		{"delete", "DELETE", "/api/tasks/" + id, "", "", "", ""},
		{"health", "GET", "/healthz", "", "", json, "no-store"},
		{"ready", "GET", "/readyz", "", "", json, "no-store"},
		{"openapi", "GET", "/openapi.json", "", "", json, "no-cache"},
		{"docs", "GET", "/docs", "", "", "text/html; charset=utf-8", "no-cache"},
		{"docs not modified", "GET", "/docs", "", "*", "", "no-cache"},
		{"metrics", "GET", "/metrics", "", "", "text/plain; version=0.0.4; charset=utf-8", "no-store"},
		{"root", "GET", "/", "", "", "", ""},
	} {
		a.run(tt.name, func(a *api) {
			var header []string
			if tt.ifNoneMatch != "" {
				header = []string{"If-None-Match", tt.ifNoneMatch}
			}
			got := a.do(tt.method, tt.path, tt.body, header...).Header
			for name, want := range map[string]string{
				"X-Content-Type-Options": "nosniff", "Content-Type": tt.mediaType, "Cache-Control": tt.cache,
				"Vary": "", "Access-Control-Allow-Origin": "", "Connection": "",
			} {
				if got.Get(name) != want {
					a.Errorf("%s is %q, want %q", name, got.Get(name), want)
				}
			}
		})
	}
}

// JSON has the characters special to HTML as themselves, in problems too.
func TestJSONCharacters(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{})
	got := a.want(404, a.do("GET", "/api/tasks/%3C&%3E", ""))
	if !strings.Contains(a.detail(got), "<&>") || !bytes.Contains(got.body, []byte("<&>")) {
		t.Errorf("%s", got.body)
	}
	got = a.want(422, a.do("GET", "/api/tasks?%3C%26%3E=1", ""))
	if !bytes.Contains(got.body, []byte(`"parameter":"<&>"`)) {
		t.Errorf("%s", got.body)
	}
}

func TestCORS(t *testing.T) {
	t.Parallel()
	const app, other = "https://app.example", "https://other.example"
	dbURL := newDatabase(t)
	off := newAPIOn(t, dbURL, Options{})
	named := newAPIOn(t, dbURL, Options{CORSOrigins: []string{"https://first.example", app}})
	all := newAPIOn(t, dbURL, Options{CORSOrigins: []string{"*"}})
	named.log.expected.Store(true)
	for _, tt := range []struct {
		name          string
		api           *api
		origin        string
		allowed, vary bool
	}{
		{"off", off, app, false, false},
		{"off, no origin", off, "", false, false},
		{"named", named, app, true, true},
		{"unnamed", named, other, false, true},
		{"in another case", named, "https://APP.example", false, true},
		{"of another scheme", named, "http://app.example", false, true},
		{"of another port", named, app + ":8443", false, true},
		{"with more in front", named, "https://x.app.example", false, true},
		{"with more behind", named, app + ".evil.example", false, true},
		{"null", named, "null", false, true},
		{"star", named, "*", false, true},
		{"no origin", named, "", false, true},
		{"all", all, other, true, true},
		{"all, null", all, "null", true, true},
		{"all, no origin", all, "", false, true},
	} {
		tt.api.run(tt.name, func(a *api) {
			id := a.create(`{"title":"a"}`).ID
			var header []string
			if tt.origin != "" {
				header = []string{"Origin", tt.origin, "Sec-Fetch-Site", "cross-site"}
			}
			want, exposed, preflight := "", "", 405
			if tt.allowed {
				want, exposed, preflight = tt.origin, "ETag, Idempotency-Replayed, Link, Location, Retry-After, WWW-Authenticate, X-Request-ID", 204
			}
			check := func(status int, got *answer) {
				a.Helper()
				a.want(status, got)
				credentials := map[bool]string{true: "true"}[want == app]
				if h := got.Header; h.Get("Access-Control-Allow-Origin") != want || elements(h.Get("Access-Control-Expose-Headers")) != exposed ||
					(h.Get("Vary") == "Origin") != tt.vary || h.Get("Access-Control-Allow-Credentials") != credentials {
					a.Errorf("%s %s: %s", got.Request.Method, got.Request.URL, h)
				}
			}
			for path, status := range map[string]int{
				"/": 307, "/healthz": 200, "/docs": 200, "/nowhere": 404, "//": 404, "/api/tasks": 200, "/api/tasks/" + id: 200,
				"/api/tasks/x": 404, "/api/tasks?x": 422, "/api/tasks/" + id + "/complete": 405,
			} {
				check(status, a.do("GET", path, "", header...))
			}
			check(preflight, a.do("OPTIONS", "/api/tasks", "", append(header, "Access-Control-Request-Method", "POST")...))
			for _, op := range append(changes(id), operations(id)[0]) {
				if tt.origin != "" && !tt.allowed {
					op.want = 403
				}
				check(op.want, a.do(op.method, op.path, op.body, header...))
			}
		})
	}
}

func TestPreflight(t *testing.T) {
	t.Parallel()
	const app = "https://app.example"
	a := newAPI(t, Options{CORSOrigins: []string{app}})
	for _, tt := range []struct{ path, want, methods string }{
		{"/api/tasks", "204", "GET, HEAD, POST"},
		{"/api/tasks/", "204", "GET, HEAD, POST"},
		{"/api/tasks/" + noTask, "204", "DELETE, GET, HEAD, PATCH, PUT"},
		{"/api/tasks/" + noTask + "/complete", "204", "PATCH"},
		{"/readyz", "204", "GET, HEAD"},
		{"/nowhere", "404", ""},
		{"/api//tasks", "404", ""},
		{"/api/tasks/x/y", "404", ""},
	} {
		a.run(tt.path, func(a *api) {
			const asked = "authorization, traceparent"
			got := a.do("OPTIONS", tt.path, "", "Origin", app, "Access-Control-Request-Method", "PUT", "Access-Control-Request-Headers", asked)
			outcome := a.outcome(got)
			if methods := elements(got.Header.Get("Access-Control-Allow-Methods")); outcome != tt.want || methods != tt.methods {
				a.Errorf("%s, %s; want %s, %s", outcome, methods, tt.want, tt.methods)
			}
			if outcome != "204" {
				return
			}
			if got.Header.Get("X-Request-ID") == "" || got.Header.Get("X-Content-Type-Options") != "nosniff" || got.Header.Get("Allow") != "" || got.Header.Get("Content-Type") != "" {
				a.Errorf("%s", got.Header)
			}
			if headers := got.Header.Get("Access-Control-Allow-Headers"); headers != asked {
				a.Errorf("allowed headers: %s, want %s", headers, asked)
			}
			if age := got.Header.Get("Access-Control-Max-Age"); !regexp.MustCompile("^[1-9][0-9]*$").MatchString(age) {
				a.Errorf("max age: %q", age)
			}
		})
	}
	// Without Access-Control-Request-Method it is no preflight.
	if got := a.outcome(a.do("OPTIONS", "/api/tasks", "", "Origin", app)); got != "405" {
		t.Errorf("no preflight: %s", got)
	}
}

func TestCrossOrigin(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{})
	id := a.create(`{"title":"a"}`).ID
	for _, tt := range []struct {
		name         string
		site, origin string
		refused      bool
	}{
		{"no browser", "", "", false},
		{"user's own doing", "none", "", false},
		{"same origin", "same-origin", a.url, false},
		{"same origin, proxied", "same-origin", "https://api.example", false},
		{"same site", "same-site", a.url, true},
		{"cross site", "cross-site", "https://evil.example", true},
		{"cross site without origin", "cross-site", "", true},
		{"unknown site", "other", "", true},
		{"old browser, same origin", "", a.url, false},
		{"old browser, other origin", "", "https://evil.example", true},
		{"old browser, other port", "", "http://127.0.0.1:1", true},
		{"old browser, no origin to tell", "", "null", true},
	} {
		a.run(tt.name, func(a *api) {
			var header []string
			if tt.site != "" {
				header = append(header, "Sec-Fetch-Site", tt.site)
			}
			if tt.origin != "" {
				header = append(header, "Origin", tt.origin)
			}
			for _, op := range operations(id)[:6] {
				want := op.want
				if tt.refused && op.method != "GET" {
					want = 403
				}
				a.want(want, a.do(op.method, op.path, op.body, header...))
			}
			victim := a.create(`{"title":"a"}`).ID
			got := a.do("DELETE", "/api/tasks/"+victim, "", header...)
			if (a.outcome(got) == "403") != tt.refused || a.do("GET", "/api/tasks/"+victim, "").StatusCode != map[bool]int{false: 404, true: 200}[tt.refused] {
				a.Errorf("DELETE: %s", got.Status)
			}
		})
	}
}

// Requests whose body has been read leave their connection open for others,
// pipelined ones too.
func TestKeepAlive(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{})
	c := a.dial()
	for range 3 {
		c.send("POST /api/tasks HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\nContent-Length: 13\r\n\r\n{\"title\":\"a\"}" +
			"GET /api/tasks HTTP/1.1\r\nHost: h\r\n\r\n")
		for _, want := range []string{"201", "200"} {
			if got := c.answer("GET"); a.outcome(got) != want || got.Close {
				t.Errorf("%s %s", got.Status, got.Header)
			}
		}
	}
}

// The other pages

func TestPages(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{})
	for _, tt := range []struct {
		path, want, location string
	}{
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
	}
}

func TestReady(t *testing.T) {
	t.Parallel()
	t.Run("shutdown", func(t *testing.T) {
		t.Parallel()
		a := newAPI(t, Options{})
		a.log.expected.Store(true)
		a.want(200, a.do("GET", "/readyz", ""))
		a.Drain()
		if got := a.outcome(a.do("GET", "/readyz", "")); got != "503" {
			t.Error(got)
		}
		a.want(200, a.do("GET", "/healthz", ""))
		a.create(`{"title":"a"}`)
	})
	t.Run("no database", func(t *testing.T) {
		t.Parallel()
		a := newAPI(t, Options{})
		a.log.expected.Store(true)
		a.want(200, a.do("GET", "/readyz", ""))
		var name string
		if err := a.db.QueryRow("SELECT current_database()").Scan(&name); err != nil {
			t.Fatal(err)
		}
		execSQL(t, testServer.URL, "DROP DATABASE "+name+" WITH (FORCE)")
		for range 2 {
			if got := a.outcome(a.do("GET", "/readyz", "")); got != "503" {
				t.Errorf("ready: %s", got)
			}
			for _, op := range operations(noTask) {
				if got := a.outcome(a.do(op.method, op.path, op.body)); got != "503" {
					t.Errorf("%s %s: %s", op.method, op.path, got)
				}
			}
		}
		a.want(200, a.do("GET", "/healthz", ""))
	})
}

// One line a request, with what the contract names and never a body.
func TestLog(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{})
	const secret = "do-not-tell"
	id := a.create(`{"title":"`+secret+`"}`, "X-Request-ID", "r0").ID
	for i, tt := range []struct{ method, path, body, route, status string }{
		{"GET", "/api/tasks/", "", "/api/tasks", "200"},
		{"GET", "/api/tasks?user_id=" + secret, "", "/api/tasks", "200"},
		{"GET", "/api/tasks/" + id, "", "/api/tasks/{id}", "200"},
		{"PUT", "/api/tasks/" + id, `{"title":"` + secret + `","description":1}`, "/api/tasks/{id}", "422"},
		{"PATCH", "/api/tasks/" + id, `{"` + secret, "/api/tasks/{id}", "400"},
		{"PATCH", "/api/tasks/" + id + "/complete", "", "/api/tasks/{id}/complete", "200"},
		{"DELETE", "/api/tasks/" + noTask, "", "/api/tasks/{id}", "404"},
		{"DELETE", "/api/tasks", "", "unmatched", "405"},
		{"GET", "/" + secret, "", "unmatched", "404"},
		{"GET", "/", "", "/{$}", "307"},
		{"GET", "/healthz", "", "/healthz", "200"},
		{"HEAD", "/healthz", "", "/healthz", "200"},
	} {
		got := a.do(tt.method, tt.path, tt.body, "X-Request-ID", fmt.Sprintf("r%d", i+1))
		line := regexp.MustCompile(fmt.Sprintf(`(?m)^time=\S+ level=INFO msg=request method=%s route=%s status=%s duration_ms=[0-9.]+ bytes=%d request_id=r%d$`,
			tt.method, regexp.QuoteMeta(tt.route), tt.status, len(got.body), i+1))
		defer func() {
			if n := len(line.FindAllString(a.log.String(), -1)); n != 1 {
				t.Errorf("%d lines are %s in\n%s", n, line, a.log)
			}
		}()
	}
	a.server.Close() // waits for the log
	if log := a.log.String(); strings.Count(log, "\n") != 13 || strings.Contains(log, secret) {
		t.Errorf("logged:\n%s", log)
	}
}

func TestMetrics(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{})
	id := a.create(`{"title":"a"}`).ID
	for _, path := range []string{"/api/tasks", "/api/tasks/", "/api/tasks?limit=5", "/api/tasks/" + id, "/api/tasks/x", "/api/tasks/" + noTask, "/x", "/y", "/"} {
		a.do("GET", path, "")
	}
	a.do("HEAD", "/api/tasks", "")
	a.do("PATCH", "/api/tasks/"+id+"/complete", "")
	a.do("DELETE", "/api/tasks", "")
	a.do("BREW", "/api/tasks", "")
	a.server.Close() // waits until all are counted
	page := httptest.NewRecorder()
	a.ServeHTTP(page, httptest.NewRequest("GET", "/metrics", nil))
	got := map[string]float64{}
	all := parseMetrics(t, page.Body.Bytes())
	for series, n := range all {
		if labels, ok := strings.CutPrefix(series, "http_requests_total{"); ok {
			got[strings.TrimSuffix(labels, "}")] = n
		}
	}
	want := map[string]float64{
		`route="/api/tasks",method="POST",status="201"`:                1,
		`route="/api/tasks",method="GET",status="200"`:                 3,
		`route="/api/tasks",method="HEAD",status="200"`:                1,
		`route="/api/tasks/{id}",method="GET",status="200"`:            1,
		`route="/api/tasks/{id}",method="GET",status="404"`:            2,
		`route="/api/tasks/{id}/complete",method="PATCH",status="200"`: 1,
		`route="/{$}",method="GET",status="307"`:                       1,
		`route="unmatched",method="GET",status="404"`:                  2,
		`route="unmatched",method="DELETE",status="405"`:               1,
		`route="unmatched",method="other",status="405"`:                1,
	}
	if !maps.Equal(got, want) {
		t.Errorf("got  %v\nwant %v", got, want)
	}
	for series, want := range map[string]float64{
		"http_requests_in_flight":     1, // that for the page
		"go_sql_max_open_connections": 10,
		`http_request_duration_seconds_count{route="/api/tasks",method="GET",status="200"}`: 3,
	} {
		if all[series] != want {
			t.Errorf("%s is %v, want %v", series, all[series], want)
		}
	}
}

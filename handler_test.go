package main

// handler_test.go is the contract as tables, through the real handler over real
// HTTP on a real PostgreSQL. Every answer that any test gets by [api.do] is also
// held against openapi.json.

import (
	"bytes"
	"context"
	"database/sql"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
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
	t.Cleanup(func() { execSQL(t, testServer.URL, "DROP DATABASE "+name+" WITH (FORCE)") })
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
	return newAPIOn(t, newDatabase(t), opts)
}

// newAPIOn returns a service on the database that dbURL names.
func newAPIOn(t testing.TB, dbURL string, opts Options) *api {
	t.Helper()
	a := &api{TB: t, dbURL: dbURL, db: open(t, dbURL), log: &testLog{t: t}}
	t.Cleanup(func() { a.db.Close() })
	store := NewStore(a.db)
	if err := store.Migrate(t.Context()); err != nil {
		t.Fatal(err)
	}
	opts.Logger = slog.New(slog.NewTextHandler(a.log, nil))
	a.Handler = NewHandler(store, opts)
	a.server = httptest.NewServer(a.Handler)
	t.Cleanup(a.server.Close)
	a.url = a.server.URL
	return a
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

func TestCreate(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{})
	got := a.create(`{"title": "Buy milk"}`)
	if got.Title != "Buy milk" || got.Version != 1 || got.Completed || got.Description != nil || got.UserID != nil {
		t.Errorf("got %+v", got)
	}
}

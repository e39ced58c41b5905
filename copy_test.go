package main

// copy_test.go takes the service along, as README says: it copies the part to
// take into another module, mounts it there, adds a field and a resource, and
// carries the tasks of another program over. Pools and routers that are not the
// service's own are tested here too.

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// read returns a file's text.
func read(t testing.TB, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// write writes a file, and the directory that it is in.
func write(t testing.TB, path, text string) {
	t.Helper()
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o644)); err != nil {
		t.Fatal(err)
	}
}

// fences returns README's code in a language.
func fences(t testing.TB, language string) (all []string) {
	t.Helper()
	for _, m := range regexp.MustCompile("(?ms)^```"+language+"\n(.*?)^```$").FindAllStringSubmatch(read(t, "README.md"), -1) {
		all = append(all, m[1])
	}
	return all
}

// copyTo copies the part to take, and its tests, into a directory.
func copyTo(t testing.TB, dir string) {
	t.Helper()
	stay := regexp.MustCompile(`(?m)^rm (.*?) #`).FindStringSubmatch(strings.Join(fences(t, "sh"), ""))
	for _, pattern := range []string{"*.go", "*.sql", "*.json", "*.html"} {
		names, _ := filepath.Glob(pattern)
		for _, name := range names {
			if !slices.Contains(strings.Fields(stay[1]), name) {
				to := filepath.Join(dir, strings.Replace(name, "localdb.go", "localdb_test.go", 1))
				write(t, to, strings.Replace(read(t, name), "package main\n", "package tasks\n", 1))
			}
		}
	}
}

// patch applies a diff to the files in a directory. Unlike patch(1) it goes by
// what the lines are, not by their numbers.
func patch(t testing.TB, dir, diff string) {
	t.Helper()
	for _, file := range strings.Split("\n"+diff, "\n--- a/")[1:] {
		name, _, _ := strings.Cut(file, "\n")
		rest, done := read(t, filepath.Join(dir, name)), ""
		for _, hunk := range regexp.MustCompile(`(?m)^@@.*\n`).Split(file, -1)[1:] {
			var before, after string
			for line := range strings.Lines(strings.TrimSuffix(hunk, "\n") + "\n") {
				if line[0] != '+' {
					before += line[1:]
				}
				if line[0] != '-' {
					after += line[1:]
				}
			}
			skipped, follows, found := strings.Cut(rest, before)
			if !found {
				t.Fatalf("%s does not have\n%s", name, before)
			}
			done, rest = done+skipped+after, follows
		}
		write(t, filepath.Join(dir, name), done+rest)
	}
}

// readmePackage returns README's Go code as a package.
func readmePackage(t testing.TB) string {
	declarations, statements := "", ""
	for _, code := range fences(t, "go") {
		if strings.Contains(code, "\nfunc ") {
			declarations += code
		} else {
			statements += code + "_, _ = mux, server\n"
		}
	}
	code := declarations + "func _(store *tasks.Store, api *tasks.Handler) {\n" + statements + "}\n"
	imports := "\t\"example.com/app/tasks\"\n"
	for _, path := range []string{"context", "crypto/ed25519", "encoding/base64", "encoding/json", "errors", "net", "net/http", "strings", "time"} {
		if strings.Contains(code, filepath.Base(path)+".") {
			imports += "\t\"" + path + "\"\n"
		}
	}
	return "package app\n\nimport (\n" + imports + ")\n\n" + code
}

// The part to take and its tests make a package of another module. README's code
// compiles with it, and a field and a resource can be added to it.
func TestCopy(t *testing.T) {
	t.Parallel()
	old := newAPIOn(t, newDatabase(t), Options{})
	old.create(`{"title": "a"}`, "Idempotency-Key", "old")
	dir := t.TempDir()
	write(t, filepath.Join(dir, "go.mod"), strings.Replace(read(t, "go.mod"), "module tasks\n", "module example.com/app\n", 1))
	write(t, filepath.Join(dir, "go.sum"), read(t, "go.sum"))
	write(t, filepath.Join(dir, "app.go"), readmePackage(t))
	write(t, filepath.Join(dir, "app_test.go"), read(t, "testdata/app_test.go"))
	copyTo(t, filepath.Join(dir, "tasks"))
	grown := filepath.Join(dir, "grown")
	copyTo(t, grown)
	for _, name := range []string{"due_date", "projects"} {
		patch(t, grown, read(t, filepath.Join("testdata", name+".diff")))
		write(t, filepath.Join(grown, name+"_test.go"), read(t, filepath.Join("testdata", name+"_test.go")))
	}
	write(t, filepath.Join(grown, "projects.go"), read(t, "testdata/projects.go.txt"))
	command := func(args ...string) string {
		t.Helper()
		cmd := exec.Command("go", args...)
		cmd.Dir = dir
		cmd.Env = append(os.Environ(), "GOPROXY=off", "GOWORK=off", "GOFLAGS=-trimpath", "TASKS_TEST_OLD="+old.dbURL, "TASKS_TEST_APP="+newDatabase(t))
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("go %s: %v\n%s", args[0], err, out)
		}
		return string(out)
	}
	for dep := range strings.FieldsSeq(command("list", "-deps", "-f", "{{if not .Standard}}{{.ImportPath}}{{end}}", ".")) {
		if !strings.HasPrefix(dep, "example.com/app") && !strings.HasPrefix(dep, "github.com/lib/pq") {
			t.Errorf("it needs %s", dep)
		}
	}
	if out := command("test", "-count=1", "-run", "^Test(App|DueDate|Projects|OpenAPI.*|Server.*|Migrate.*|Representation|IDs|Decode.*)$",
		"-skip", "OpenAPIRoutes", "./..."); strings.Contains(out, "no tests") {
		t.Error(out)
	}
	cmd := exec.Command("go", "test", "-run", "^TestOpenAPIRoutes$", ".")
	cmd.Dir = grown
	if out, err := cmd.CombinedOutput(); err == nil || !strings.Contains(string(out), "GET /api/projects") {
		t.Errorf("projects are not described: %s", out)
	}
}

// On a pool of lib/pq's own driver a request is applied at most once, too. (That
// a silent server is noticed takes OpenDB's pools.)
func TestAnyPool(t *testing.T) {
	t.Parallel()
	for f := cutBefore; f < stall; f++ {
		t.Run(fmt.Sprint(f), func(t *testing.T) {
			t.Parallel()
			dbURL := newDatabase(t)
			p := newProxy(t, dbURL)
			db, err := sql.Open("postgres", p.url)
			if err != nil {
				t.Fatal(err)
			}
			w := newWorkload(newAPIWithDB(t, p.url, db, Options{}), 3*len(actions))
			w.send(opGet, false)
			for _, op := range actions {
				p.times(1, f)
				if c := w.send(op, false); c.status != op.success && c.status != http.StatusServiceUnavailable {
					t.Errorf("%s: status %d", op.name, c.status)
				}
			}
			for _, op := range actions {
				if c := w.send(op, false); c.status != op.success {
					t.Errorf("%s after the fault: status %d", op.name, c.status)
				}
			}
			w.audit(dbURL)
		})
	}
}

// withPathValue is a router that sets a path value of its own, as chi does.
func withPathValue(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		r.SetPathValue("id", "42")
		h.ServeHTTP(w, r)
	})
}

// Any router may come before the handler, and several handlers share a store.
func TestAnyRouter(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{})
	mux := http.NewServeMux()
	mux.Handle("/api/tasks", a.Handler)
	mux.Handle("/api/tasks/", a.Handler)
	// The deadline of an outer handler is no client that has gone.
	unlock := lockTasks(t, a.dbURL, lockTable)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	late := httptest.NewRecorder()
	a.log.expected.Store(true)
	a.Handler.ServeHTTP(late, httptest.NewRequestWithContext(ctx, "GET", "/api/tasks", nil))
	unlock()
	if late.Code != http.StatusServiceUnavailable {
		t.Errorf("the outer deadline: %d", late.Code)
	}
	acme := NewHandler(a.store, Options{Prefix: "/acme", Logger: a.opts.Logger, RequestTimeout: -1, MaxInFlight: -1, Hosts: []string{"example.com"}})
	mux.Handle("/acme/", withPathValue(http.StripPrefix("/acme", acme)))
	for name, h := range map[string]http.Handler{"path value": withPathValue(a.Handler), "mux": mux, "mux and prefix": mux} {
		prefix := ""
		if name == "mux and prefix" {
			prefix = "/acme"
		}
		path := prefix + "/api/tasks"
		for _, step := range []struct{ method, path, body, want string }{
			{"POST", "", `{"title": "a"}`, "201"},
			{"POST", "/", `{"title": "a"}`, "201"}, // whose Location follows
			{"GET", "LOCATION", "", "200"},
			{"PATCH", "LOCATION/complete", "", "200"},
			{"GET", "/42", "", "404"},
			{"PUT", "", "{}", "405"},
			{"GET", "?limit=1", "", "200 <" + path + "?after="},
			{"DELETE", "LOCATION/", "", "204"},
		} {
			req := httptest.NewRequestWithContext(t.Context(), step.method, prefix+"/api/tasks"+step.path, strings.NewReader(step.body))
			if rest, ok := strings.CutPrefix(step.path, "LOCATION"); ok {
				req.URL.Path = path + rest
			}
			req.Header.Set("Content-Type", "application/json")
			rec := httptest.NewRecorder()
			h.ServeHTTP(rec, req)
			if got := fmt.Sprint(rec.Code, " ", rec.Header().Get("Link")); !strings.HasPrefix(got, step.want) {
				t.Errorf("%s: %s %s: %s%s, want %s", name, step.method, req.URL, got, rec.Body, step.want)
			}
			if location := rec.Header().Get("Location"); location != "" {
				path = location
			}
		}
	}
}

// A host's mistakes are reported, and end when the host corrects them.
func TestHostMistakes(t *testing.T) {
	t.Parallel()
	if err := NewStore(open(t, "host=127.0.0.1 port=1 user=a")).Migrate(t.Context()); !errors.Is(err, ErrUnavailable) {
		t.Errorf("no database: %v", err)
	}
	a := newAPI(t, Options{})
	a.exec("CREATE TABLE users (id text COLLATE \"C\" PRIMARY KEY); ALTER TABLE tasks ADD FOREIGN KEY (user_id) REFERENCES users")
	for _, header := range []string{"Idempotency-Key", "Unknown"} {
		if got := a.outcome(a.do("POST", "/api/tasks?user_id=bob", `{"title": "a"}`, header, "k")); got != "422 #/user_id" {
			t.Errorf("unknown user: %s", got)
		}
	}
	a.log.expected.Store(true)
	id := a.create(`{"title": "a"}`).ID
	a.exec("CREATE TABLE comments (task uuid REFERENCES tasks); INSERT INTO comments SELECT id FROM tasks")
	a.want(http.StatusInternalServerError, a.do("DELETE", "/api/tasks/"+id, "")) // not an unknown user
	a.exec("DROP TABLE comments, tasks")
	a.want(http.StatusInternalServerError, a.do("GET", "/api/tasks", ""))
	if !strings.Contains(a.log.String(), `tasks\" does not exist`) {
		t.Errorf("Migrate never called: %s", a.log)
	}
	if err := a.store.Migrate(t.Context()); err != nil {
		t.Fatal(err)
	}
	a.create(`{"title": "a"}`)
	b := NewStore(open(t, a.dbURL+" search_path=nowhere"))
	for range 2 {
		if _, err := b.Get(t.Context(), Target{ID: noTask}); err == nil || !strings.Contains(err.Error(), "search_path") {
			t.Errorf("unknown schema: %v", err)
		}
	}
	a.exec("CREATE SCHEMA nowhere")
	if err := b.Migrate(t.Context()); err != nil {
		t.Error(err)
	}
	if _, err := b.Get(t.Context(), Target{ID: noTask}); !errors.Is(err, ErrNotFound) {
		t.Errorf("schema created: %v", err)
	}
}

// README's SQL carries the tasks of an SQLModel table over.
func TestFromSQLModel(t *testing.T) {
	t.Parallel()
	for _, user := range []string{"varchar", "integer"} {
		t.Run(user, func(t *testing.T) {
			t.Parallel()
			dbURL := newDatabase(t)
			execSQL(t, dbURL, `CREATE TABLE tasks (id serial PRIMARY KEY, user_id `+user+`, title varchar, description varchar,
				completed boolean, created_at timestamp, updated_at timestamp);
				CREATE INDEX ix_tasks_user_id ON tasks (user_id);
				INSERT INTO tasks (user_id, title, description, completed, created_at, updated_at)
				SELECT CASE n % 10 WHEN 0 THEN NULL ELSE n % 10 END, 'title ' || n, nullif('text ' || n % 7, 'text 0'), n % 3 = 0,
					timestamp '2024-05-06 07:08:09.123456' + n / 3 * interval '1 microsecond', '2025-01-01' FROM generate_series(1, 1000) AS n;
				UPDATE tasks SET title = NULL, completed = NULL, updated_at = NULL WHERE id = 1;
				UPDATE tasks SET title = E' \u3000\n', updated_at = '-infinity' WHERE id = 2;
				UPDATE tasks SET title = repeat(' ', 200) || 'x', updated_at = '2000-01-01' WHERE id = 3;
				UPDATE tasks SET title = repeat('😀', 201), description = repeat('é', 10001), updated_at = 'infinity' WHERE id = 4;
				UPDATE tasks SET created_at = 'infinity' WHERE id = 1000;
				UPDATE tasks SET created_at = NULL WHERE id = 999;
				UPDATE tasks SET created_at = '12024-01-01' WHERE id = 998`)
			for i, statement := range fences(t, "sql") {
				if execSQL(t, dbURL, statement); i == 0 {
					newAPIOn(t, dbURL, Options{})
				}
			}
			a := newAPIOn(t, dbURL, Options{})
			tasks := decode[[]Task](t, a.do("GET", "/api/tasks?limit=1000", ""))
			if len(tasks) != 1000 {
				t.Fatalf("%d tasks", len(tasks))
			}
			for i, task := range tasks {
				n := i + 1
				want := Task{ID: task.ID, Title: fmt.Sprint("title ", n), Completed: n%3 == 0, Version: 1,
					CreatedAt: time.Date(2024, 5, 6, 7, 8, 9, 123456000, time.UTC).Add(time.Duration(n/3) * time.Microsecond), UpdatedAt: time.Date(2025, 1, 1, 0, 0, 0, 0, time.UTC)}
				if n%10 != 0 {
					want.UserID = new(fmt.Sprint(n % 10))
				}
				if n%7 != 0 {
					want.Description = new(fmt.Sprint("text ", n%7))
				}
				switch {
				case n < 4:
					want.Title, want.UpdatedAt, want.Completed = "(no title)", want.CreatedAt, n == 3
				case n == 4:
					want.Title, want.Description, want.UpdatedAt = strings.Repeat("😀", 200), new(strings.Repeat("é", 10_000)), want.CreatedAt
				case n >= 998 && time.Since(task.CreatedAt) < time.Minute:
					want.CreatedAt, want.UpdatedAt = task.CreatedAt, task.CreatedAt
				}
				if got, want := string(task.appendJSON(nil)), string(want.appendJSON(nil)); got != want {
					t.Errorf("row %d: %s, want %s", n, got, want)
				}
			}
		})
	}
}

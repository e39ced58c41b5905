package main

// bench_test.go measures each operation with 16 clients over HTTP and, for its
// floor, as the statement alone through database/sql. PostgreSQL has fsync off, as
// for all tests, and shares the machine with the service and its clients.

import (
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

const (
	benchClients = 16
	benchUsers   = 100 // among whom the tasks are divided; one task in 100 is completed
)

// benchID returns the id of the i-th task, from 1, that fill makes.
func benchID(i int) string {
	return fmt.Sprintf("%08x-%04x-7000-8000-%012x", i>>16, i&0xffff, i)
}

// fill adds tasks to an empty database.
func fill(b *testing.B, url string, tasks int) {
	execSQL(b, url, `
		INSERT INTO tasks (id, user_id, title, description, completed)
		SELECT (lpad(to_hex(i / 65536), 8, '0') || '-' || lpad(to_hex(i % 65536), 4, '0') || '-7000-8000-' || lpad(to_hex(i), 12, '0'))::uuid,
			'user' || i % $2, 'Task number ' || i, 'What there is to say of task number ' || i, i % 100 = 0
		FROM generate_series(1, $1::bigint) AS i`, tasks, benchUsers)
	execSQL(b, url, "VACUUM ANALYZE tasks")
}

func BenchmarkTasks(b *testing.B) {
	for _, tasks := range []int{10_000, 1_000_000} {
		url := newDatabase(b)
		for _, prepare := range []string{"false", "true"} {
			db, err := openDB(url, prepare)
			if err != nil {
				b.Fatal(err)
			}
			defer db.Close()
			store := NewStore(db)
			if err := store.Migrate(b.Context()); err != nil {
				b.Fatal(err)
			}
			if prepare == "false" {
				fill(b, url, tasks)
			}
			b.Run(fmt.Sprintf("tasks=%d/prepare=%t", tasks, prepare == "true"), func(b *testing.B) { benchOperations(b, store, tasks) })
		}
	}
}

func benchOperations(b *testing.B, store *Store, tasks int) {
	handler := NewHandler(store, Options{Logger: slog.New(slog.NewTextHandler(io.Discard, nil))})
	server := httptest.NewServer(handler)
	defer server.Close()
	client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: benchClients}}
	send := func(method, path, body string) (t Task, err error) {
		req, err := http.NewRequest(method, server.URL+path, strings.NewReader(body))
		if err != nil {
			return t, err
		}
		req.Header.Set("Content-Type", "application/json")
		resp, err := client.Do(req)
		if err != nil {
			return t, err
		}
		defer resp.Body.Close()
		got, err := io.ReadAll(resp.Body)
		if resp.StatusCode >= 300 {
			return t, fmt.Errorf("%s: %s", resp.Status, got)
		}
		if method == "POST" {
			err = json.Unmarshal(got, &t)
		}
		return t, err
	}
	var (
		ctx         = b.Context()
		description = "two litres"
		patch       = TaskPatch{Title: &description}
		replacement = TaskPatch{Title: &description, Description: Optional[string]{Set: true}, Completed: new(false)}
		yes         = true
		deep        = benchID(tasks / 2)
		path        = func() string { return "/api/tasks/" + benchID(1+rand.IntN(tasks)) }
		target      = func() Target { return Target{ID: benchID(1 + rand.IntN(tasks))} }
		user        = func() string { return fmt.Sprintf("user%d", rand.IntN(benchUsers)) }
		post        = func() (Task, error) {
			return send("POST", "/api/tasks", fmt.Sprintf(`{"title": "Buy milk", "description": "two litres", "user_id": %q}`, user()))
		}
		insert = func() (Task, error) {
			user := user()
			t, _, err := store.Create(ctx, TaskDraft{Title: "Buy milk", Description: &description, UserID: &user}, "")
			return t, err
		}
	)
	for _, op := range []struct {
		name      string
		http, sql func() error
	}{
		{"create",
			func() error { _, err := post(); return err },
			func() error { _, err := insert(); return err }},
		{"list",
			func() error { _, err := send("GET", "/api/tasks?limit=50&user_id="+user(), ""); return err },
			func() error { u := user(); _, _, err := store.List(ctx, Filter{Owner: &u, Limit: 50}); return err }},
		{"list-deep",
			func() error { _, err := send("GET", "/api/tasks?limit=50&completed=true&after="+deep, ""); return err },
			func() error {
				_, _, err := store.List(ctx, Filter{Completed: &yes, Limit: 50, After: deep})
				return err
			}},
		{"get",
			func() error { _, err := send("GET", path(), ""); return err },
			func() error { _, err := store.Get(ctx, target()); return err }},
		{"replace",
			func() error { _, err := send("PUT", path(), `{"title": "two litres"}`); return err },
			func() error { _, err := store.Patch(ctx, target(), replacement); return err }},
		{"patch",
			func() error { _, err := send("PATCH", path(), `{"title": "two litres"}`); return err },
			func() error { _, err := store.Patch(ctx, target(), patch); return err }},
		{"complete",
			func() error { _, err := send("PATCH", path()+"/complete", ""); return err },
			func() error { _, err := store.Flip(ctx, target()); return err }},
		{"create-delete",
			func() error {
				t, err := post()
				if err != nil {
					return err
				}
				_, err = send("DELETE", "/api/tasks/"+t.ID, "")
				return err
			},
			func() error {
				t, err := insert()
				if err != nil {
					return err
				}
				return store.Delete(ctx, Target{ID: t.ID})
			}},
	} {
		b.Run(op.name+"/http", func(b *testing.B) { benchParallel(b, op.http) })
		b.Run(op.name+"/sql", func(b *testing.B) { benchParallel(b, op.sql) })
	}
}

// benchParallel runs op from benchClients goroutines and reports the rate and
// percentiles of the time that it takes.
func benchParallel(b *testing.B, op func() error) {
	var (
		mu    sync.Mutex
		times []time.Duration
	)
	b.ReportAllocs()
	b.SetParallelism(max(1, benchClients/runtime.GOMAXPROCS(0)))
	b.RunParallel(func(pb *testing.PB) {
		var mine []time.Duration
		for pb.Next() {
			start := time.Now()
			if err := op(); err != nil {
				b.Error(err)
				return
			}
			mine = append(mine, time.Since(start))
		}
		mu.Lock()
		defer mu.Unlock()
		times = append(times, mine...)
	})
	slices.Sort(times)
	for _, p := range []int{50, 95, 99} {
		b.ReportMetric(float64(times[(len(times)-1)*p/100].Microseconds())/1000, fmt.Sprintf("p%d-ms", p))
	}
	b.ReportMetric(float64(len(times))/b.Elapsed().Seconds(), "req/s")
	b.ReportMetric(0, "ns/op") // what the clients wait for together says little
}

package tasks

import (
	"net/http"
	"os"
	"testing"
)

// The database is one of the version before, where the Idempotency-Key "old" has
// made a task.
func TestDueDate(t *testing.T) {
	a := newAPIOn(t, os.Getenv("TASKS_TEST_OLD"), Options{})
	const undated, dated = `{"title": "a"}`, `{"title": "a", "due_date": "2026-12-31"}`
	a.want(http.StatusUnprocessableEntity, a.do("POST", "/api/tasks", dated, "Idempotency-Key", "old"))
	old := a.want(http.StatusCreated, a.do("POST", "/api/tasks", undated, "Idempotency-Key", "old"))
	if old.Header.Get("Idempotency-Replayed") != "true" {
		t.Errorf("the key has made another task: %s", old.body)
	}
	path := "/api/tasks/" + a.task(old).ID
	for _, tt := range []struct{ method, path, body, want string }{
		{"GET", path, "", "null"},
		{"PATCH", path, `{"due_date": "2026-12-31"}`, "2026-12-31"},
		{"PATCH", path, undated, "2026-12-31"},
		{"PATCH", path + "/complete", "", "2026-12-31"},
		{"PATCH", path, `{"due_date": null}`, "null"},
		{"PUT", path, dated, "2026-12-31"},
		{"PUT", path, undated, "null"},
		{"POST", "/api/tasks", dated, "2026-12-31"},
		{"POST", "/api/tasks", `{"title": "a", "due_date": "2026-02-30"}`, "422 #/due_date"},
		{"PUT", path, `{"title": "a", "due_date": "0999-12-31"}`, "422 #/due_date"},
		{"PATCH", path, `{"due_date": 1}`, "422 #/due_date"},
	} {
		answer := a.do(tt.method, tt.path, tt.body)
		got := a.outcome(answer)
		if answer.StatusCode < 400 {
			got = "null"
			if date := a.task(answer).DueDate; date != nil {
				got = string(*date)
			}
		}
		if got != tt.want {
			t.Errorf("%s %s: %s, want %s", tt.method, tt.body, got, tt.want)
		}
	}
	tasks := decode[[]Task](a, a.do("GET", "/api/tasks", ""))
	if len(tasks) != 2 || tasks[0].DueDate != nil || *tasks[1].DueDate != "2026-12-31" {
		t.Errorf("the tasks are %+v", tasks)
	}
}

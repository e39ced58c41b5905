package tasks

import (
	"net/http/httptest"
	"strings"
	"testing"
)

func TestProjects(t *testing.T) {
	a := newAPI(t, Options{})
	one, link := "", ""
	for _, tt := range []struct{ name, method, path, header, body, want string }{
		{"create", "POST", "/api/projects", "", `{"name": "one", "user_id": "alice"}`, `201 "1"`},
		{"invalid", "POST", "/api/projects", "Idempotency-Key: é", `{"name": " ", "title": 1}`, `422 blank unknown visible`},
		{"key", "POST", "/api/projects?user_id=alice", "Idempotency-Key: k", `{"name": "two"}`, `201 "two" "1"`},
		{"key, repeated", "POST", "/api/projects", "Idempotency-Key: k", `{"name": "two", "user_id": "alice"}`, `201 "two" true`},
		{"key, other content", "POST", "/api/projects", "Idempotency-Key: k", `{"name": "too", "user_id": "alice"}`, `422 Idempotency-Key`},
		{"get", "GET", "ONE", "", "", `200 {"id":" "user_id":"alice","name":"one","version":1,"created_at":" "}`},
		{"get, unchanged", "GET", "ONE", `If-None-Match: "1"`, "", `304`},
		{"get, another's", "GET", "ONE?user_id=bob", "", "", `404`},
		{"patch", "PATCH", "ONE", `If-Match: "1"`, `{"name": "uno"}`, `200 "uno" "2"`},
		{"patch, late", "PATCH", "ONE", `If-Match: "1"`, `{"name": "eins"}`, `412`},
		{"patch nothing", "PATCH", "ONE", `If-Match: "2"`, `{}`, `200 "uno" "2"`},
		{"patch nothing, late", "PATCH", "ONE", `If-Match: "1"`, `{}`, `412`},
		{"list", "GET", "/api/projects?user_id=alice&limit=1", "", "", `200 "uno" rel="next"`},
		{"next page", "GET", "LINK", "", "", `200 [{"id" "two"`},
		{"backwards", "GET", "/api/projects?sort=-created_at&limit=1", "", "", `200 "two"`},
		{"another's list", "GET", "/api/projects?user_id=bob", "", "", `200 []`},
		{"filter of tasks", "GET", "/api/projects?completed=true", "", "", `422 completed`},
		{"delete, late", "DELETE", "ONE", `If-Match: "1"`, "", `412`},
		{"delete", "DELETE", "ONE", `If-Match: "2"`, "", `204`},
		{"delete again", "DELETE", "ONE", "", "", `404`},
		{"no method", "PUT", "ONE", "", "{}", `405 DELETE, GET, HEAD, PATCH`},
		{"tasks", "POST", "/api/tasks", "", `{"title": "a"}`, `201 "title":"a"`},
	} {
		path := strings.NewReplacer("ONE", one, "LINK", link).Replace(tt.path)
		req := httptest.NewRequestWithContext(t.Context(), tt.method, path, strings.NewReader(tt.body))
		req.Header.Set("Content-Type", "application/json")
		if name, value, ok := strings.Cut(tt.header, ": "); ok {
			req.Header.Set(name, value)
		}
		rec := httptest.NewRecorder()
		a.Handler.ServeHTTP(rec, req)
		head := rec.Header()
		got := rec.Result().Status + " " + rec.Body.String() + head.Get("Etag") + head.Get("Link") + head.Get("Allow") + head.Get("Idempotency-Replayed")
		for want := range strings.FieldsSeq(tt.want) {
			if !strings.Contains(got, want) {
				t.Errorf("%s: %s, want %s", tt.name, got, tt.want)
			}
		}
		if tt.name == "create" {
			one = head.Get("Location")
		}
		if tt.name == "list" {
			link, _, _ = strings.Cut(strings.TrimPrefix(head.Get("Link"), "<"), ">")
		}
	}
}

package main

// request_test.go tests what is checked before an operation: who may ask, what a
// request may contain, and in which order its faults are told.

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// A request that breaks every rule is corrected step by step. Each response names
// the first rule that is still broken.
func TestOrderOfChecks(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{})
	a.log.expected.Store(true)
	id := a.create(`{"title":"a","user_id":"alice"}`).ID
	user, userErr := "alice", errors.New("expired")
	a = a.with(Options{Hosts: []string{"tasks.example"}, MaxInFlight: 1, Authenticate: func(*http.Request) (string, error) { return user, userErr }})
	a.slots <- struct{}{}
	method, path, query, body := "POST", "/nowhere/x/", "?colour=1&user_id=bob", strings.Repeat(" ", 128<<10+1)
	header := map[string]string{"Host": "evil.example", "Sec-Fetch-Site": "cross-site", "Content-Type": "text/plain", "Content-Encoding": "gzip", "If-Match": `"9"`}
	for _, step := range []struct {
		mended string
		mend   func()
		want   string
	}{
		{"nothing", func() {}, "421"},
		{"host", func() { header["Host"] = "localhost" }, "404"},
		{"path", func() { path = "/api/tasks/x/" }, "405"},
		{"method", func() { method = "PUT" }, "403"},
		{"origin", func() { header["Sec-Fetch-Site"] = "same-origin" }, "401"},
		{"authentication", func() { userErr = nil }, "503"},
		{"limit", func() { <-a.slots }, "403"},
		{"scope", func() { query = "?colour=1" }, "422 colour"},
		{"query", func() { query = "" }, "404"},
		{"id", func() { path = "/api/tasks/" + noTask }, "415"},
		{"encoding", func() { header["Content-Encoding"] = "identity" }, "415"},
		{"media type", func() { header["Content-Type"] = "application/json" }, "413"},
		{"size", func() { body = `{"title":1,"title":2` }, "400"},
		{"end", func() { body += "}" }, "400"},
		{"form", func() { body = `{"title":" "}` }, "422 #/title"},
		{"or, of a new task", func() { method, path, body = "POST", "/api/tasks", `{"title":" ","user_id":"bob"}` }, "403"},
		{"owner", func() { body = `{"title":" "}` }, "422 #/title"},
		{"rules", func() { method, path, body = "PUT", "/api/tasks/"+noTask, `{"title":"a"}` }, "404"},
		{"absence", func() { path = "/api/tasks/" + id; user = "bob" }, "404"},
		{"ownership", func() { user = "alice" }, "412"},
		{"version", func() { header["If-Match"] = `"1"` }, "200"},
	} {
		step.mend()
		var fields []string
		for name, value := range header {
			fields = append(fields, name, value)
		}
		if got := a.do(method, path+query, body, fields...); a.outcome(got) != step.want {
			t.Errorf("mended up to %s: %s, want %s: %s", step.mended, got.Status, step.want, got.body)
		}
	}
}

// Authenticate decides who is asking, and fails closed.
func TestAuthenticate(t *testing.T) {
	t.Parallel()
	const secret, origin = "do-not-tell", "https://app.example"
	a := newAPI(t, Options{})
	a.log.expected.Store(true)
	var calls int
	var authenticate func(r *http.Request) (string, error)
	opts := Options{CORSOrigins: []string{origin}, Hosts: []string{"localhost"}, Authenticate: func(r *http.Request) (string, error) {
		calls++
		return authenticate(r)
	}}
	b := a.with(opts)
	opts.RequestTimeout = 100 * time.Millisecond
	hasty := a.with(opts)
	is := func(user string) func(*http.Request) (string, error) {
		return func(*http.Request) (string, error) { return user, nil }
	}
	fails := func(err error) func(*http.Request) (string, error) {
		return func(*http.Request) (string, error) { return "alice", err }
	}
	const own, foreign = "own", "foreign"
	long := strings.Repeat("🙂", 255)
	for _, tt := range []struct {
		name         string
		authenticate func(*http.Request) (string, error)
		query, want  string
	}{
		{"alice", is("alice"), "", own},
		{"alice, who says so", is("alice"), "?user_id=alice", own},
		{"alice, who says bob", is("alice"), "?user_id=bob", "403"},
		{"alice, who says nobody", is("alice"), "?user_id=", "403"},
		{"bob", is("bob"), "", foreign},
		{"bob, who says alice", is("bob"), "?user_id=alice", "403"},
		{"a long name", is(long), "", foreign},
		{"too long a name", is(long + "🙂"), "", "403"},
		{"no name", is(""), "", "403"},
		{"no name, who says alice", is(""), "?user_id=alice", "403"},
		{"U+0000", is("alice\x00"), "", "403"},
		{"invalid UTF-8", is("alice\xff"), "", "403"},
		{"alice, who signs the body", func(r *http.Request) (string, error) {
			body, err := io.ReadAll(r.Body)
			r.Body = io.NopCloser(bytes.NewReader(body))
			return "alice", err
		}, "", own},
		{"an error", fails(errors.New(secret)), "", "401"},
		{"an error, but a user_id", fails(errors.New(secret)), "?user_id=alice", "401"},
		{"keys out of reach", fails(fmt.Errorf("%s: %w", secret, ErrUnavailable)), "", "503"},
		{"panic", func(*http.Request) (string, error) { panic(secret) }, "", "500"},
		{"too slow", func(r *http.Request) (string, error) { <-r.Context().Done(); return "", errors.New(secret) }, "", "503"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			id := a.create(`{"title":"a","user_id":"alice"}`).ID
			authenticate = tt.authenticate
			c := cmp.Or(map[string]*api{"too slow": hasty}[tt.name], b)
			logged := len(a.log.String())
			for _, op := range operations(id) {
				want := tt.want
				if want == own || want == foreign && !strings.Contains(op.path, id) {
					want = op.want
				} else if want == foreign {
					want = "404"
				}
				calls = 0
				got := c.expect(want, op.method, op.path+tt.query, op.body, "Origin", origin)
				if calls != 1 || got.Header.Get("Access-Control-Allow-Origin") != origin || (got.Header.Get("WWW-Authenticate") == "Bearer") != (want == "401") ||
					strings.Contains(string(got.body), secret) {
					t.Errorf("%s %s, after %d calls: %s\n%s", op.method, op.path, calls, got.Header, got.body)
				}
				if tt.want == foreign && op.method == "GET" && strings.Contains(string(got.body), id) {
					t.Errorf("a list of %s has alice's", tt.name)
				}
			}
			waitFor(t, "the log", func() bool { return strings.Count(a.log.String()[logged:], "route=/api/tasks") == 7 })
			if told := strings.Count(a.log.String()[logged:], secret); (told >= 7) != (tt.want[0] == '5') || told > 0 && tt.want[0] != '5' {
				t.Errorf("the cause is told %d times in\n%s", told, a.log.String()[logged:])
			}
			if tt.want != own {
				a.want(200, a.do("GET", "/api/tasks/"+id, "")) // is still there
			}
		})
	}
	authenticate = func(r *http.Request) (string, error) { _, err := io.ReadAll(r.Body); return "alice", err }
	b.expect("400", "PATCH", "/api/tasks/"+noTask+"/complete", `{"completed":true}`) // no flip, though nothing is left of it
	authenticate = fails(errors.New(secret))
	calls = 0
	b.expect("204", "OPTIONS", "/api/tasks", "", "Origin", origin, "Access-Control-Request-Method", "POST", "Access-Control-Request-Headers", "authorization")
	for _, path := range []string{"/healthz", "/readyz", "/metrics", "/docs", "/openapi.json"} {
		b.expect("200", "GET", path, "")
	}
	b.expect("404", "GET", "/api/nothing", "")
	b.expect("405", "DELETE", "/api/tasks", "")
	b.expect("403", "POST", "/api/tasks", `{"title":"a"}`, "Sec-Fetch-Site", "cross-site")
	b.expect("421", "GET", "/api/tasks", "", "Host", "evil.example")
	if calls != 0 {
		t.Errorf("called %d times where there is nothing to authenticate", calls)
	}
	// The body is not waited for.
	got := b.sendRaw("POST /api/tasks HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 13\r\nExpect: 100-continue\r\n\r\n").answer("POST")
	if b.outcome(got) != "401" || !got.Close {
		t.Errorf("before the body: %s %s", got.Status, got.Header)
	}
}

func TestHosts(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{})
	named, any := a.with(Options{Hosts: []string{"Tasks.Example.", "other.example"}}), a.with(Options{Hosts: []string{"x.example", "*"}})
	check := func(a *api, want, head string) {
		t.Helper()
		for _, path := range []string{"/healthz", "/api/tasks", "/docs", "/nowhere"} {
			want := want
			if want == "200" && path == "/nowhere" {
				want = "404"
			}
			got := a.sendRaw(strings.Replace(head, "PATH", path, 1) + "\r\n\r\n").answer("GET")
			if outcome := a.outcome(got); outcome != want || want == "421" && !strings.Contains(a.detail(got), "ALLOWED_HOSTS") {
				t.Errorf("%q: %s, want %s: %s", head, outcome, want, got.body)
			}
		}
	}
	for want, hosts := range map[string]string{
		"200": "tasks.example TASKS.example tasks.example. tasks.example:80 tasks.example.:80 Other.example:8080 localhost localhost:8080 LOCALHOST. a.localhost a.b.LocalHost:1 " +
			"127.0.0.1 127.0.0.1:8080 192.168.1.2:80 [::1] [::1]:8080 [2001:DB8::1]:80",
		"421": "evil.example evil.example:8080 sub.tasks.example tasks.example.evil.example tasks.example.. xtasks.example localhost.evil.example evil-localhost " +
			"127.0.0.1.evil.example 127.0.0.1x 1 *",
	} {
		for _, host := range strings.Fields(hosts) {
			check(named, want, "GET PATH HTTP/1.1\r\nHost: "+host)
			check(any, "200", "GET PATH HTTP/1.1\r\nHost: "+host)
			check(a, "200", "GET PATH HTTP/1.1\r\nHost: "+host)
		}
	}
	for head, want := range map[string]string{
		"GET PATH HTTP/1.0":                                              "200",
		"GET PATH HTTP/1.1\r\nHost:":                                     "200",
		"GET http://evil.examplePATH HTTP/1.1\r\nHost: localhost":        "421",
		"GET http://tasks.example:80PATH HTTP/1.1\r\nHost: evil.example": "200",
	} {
		check(named, want, head)
	}
}

func TestIDs(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{})
	id := a.create(`{"title":"a"}`).ID
	for _, op := range operations(strings.ToUpper(id[:19]) + id[19:])[2:] {
		if got := a.expect(op.want, op.method, op.path, op.body); op.want == "200" && a.task(got).ID != id {
			t.Errorf("%s: %s", op.method, got.body)
		}
	}
	for id, isUUID := range map[string]bool{
		noTask: true, "00000000-0000-0000-0000-000000000000": true, "FFFFFFFF-ffff-ffff-ffff-ffffffffffff": true,
		"tasks": false, "1": false, "null": false, id[:35]: false, "%7B" + id + "%7D": false, "urn:uuid:" + id: false, "%EF%BC%90" + id[3:]: false,
		"%20" + id: false, "%2F" + id[1:]: false, "%2E%2E": false, "%00": false, "%FF": false, "%3C%26%3E": false,
	} {
		for _, op := range operations(id)[2:] {
			if got := a.expect("404", op.method, op.path, op.body); strings.Contains(a.detail(got), "UUID") == isUUID {
				t.Errorf("%s %s: %s", op.method, op.path, got.body)
			}
		}
	}
}

// §3 Ownership

func TestScope(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{})
	for _, tt := range []struct {
		owner, query string // the owner as JSON
		visible      bool
	}{
		{`"alice"`, "?user_id=alice", true},
		{`"alice"`, "", true},
		{`null`, "", true},
		{`"a&b"`, "?user_id=a%26b", true},
		{`"alice"`, "?user_id=bob", false},
		{`"alice"`, "?user_id=Alice", false},
		{`"alice"`, "?user_id=alice+", false},
		{`"a&b"`, "?user_id=a", false},
		{`null`, "?user_id=null", false},
	} {
		task := a.create(`{"title":"a","user_id":` + tt.owner + `}`)
		for _, op := range operations(task.ID)[2:] {
			if tt.visible {
				a.expect(op.want, op.method, op.path+tt.query, op.body)
				continue
			}
			// Nothing tells it from a task that is not there.
			for _, match := range []string{"*", `"1"`, `"2"`} {
				got := a.expect("404", op.method, op.path+tt.query, op.body, "If-Match", match, "X-Request-ID", "1")
				absent := a.do(op.method, strings.Replace(op.path, task.ID, noTask, 1)+tt.query, op.body, "If-Match", match, "X-Request-ID", "1")
				if !bytes.Equal(got.body, absent.body) {
					t.Errorf("%s, If-Match: %s: got %s, of no task %s", op.method, match, got.body, absent.body)
				}
			}
		}
		if now := a.do("GET", "/api/tasks/"+task.ID, ""); !tt.visible && brief(a.task(now)) != brief(task) {
			t.Errorf("%s%s: it is now %s", tt.owner, tt.query, now.body)
		}
	}
}

func TestOwnerOfNewTask(t *testing.T) {
	t.Parallel()
	anyone := newAPI(t, Options{})
	alice := anyone.as("alice")
	for _, tt := range []struct {
		a                 *api
		query, body, want string // owner or outcome
	}{
		{anyone, "", `{"title":"a"}`, "null"},
		{anyone, "", `{"title":"a","user_id":"alice"}`, `"alice"`},
		{anyone, "?user_id=alice", `{"title":"a"}`, `"alice"`},
		{anyone, "?user_id=alice", `{"title":"a","user_id":null}`, `"alice"`},
		{anyone, "?user_id=alice", `{"title":"a","user_id":"alice"}`, `"alice"`},
		{anyone, "?user_id=alice", `{"title":"a","user_id":"bob"}`, "422 #/user_id"},
		{anyone, "?user_id=alice", `{"title":"a","user_id":5}`, "422 #/user_id"}, // once
		{anyone, "?user_id=alice", `{"title":" ","user_id":"bob"}`, "422 #/title #/user_id"},
		{alice, "", `{"title":"a"}`, `"alice"`},
		{alice, "", `{"title":"a","user_id":null}`, `"alice"`},
		{alice, "?user_id=alice", `{"title":"a","user_id":"alice"}`, `"alice"`},
		{alice, "?user_id=bob", `{"title":"a","user_id":"bob"}`, "403"},
		{alice, "", `{"title":"a","user_id":"bob"}`, "403"},
		{alice, "", `{"title":" ","user_id":"bob"}`, "403"},
		{alice, "", `{"title":"a","user_id":""}`, "403"},
	} {
		got := tt.a.do("POST", "/api/tasks"+tt.query, tt.body)
		outcome := tt.a.outcome(got)
		if outcome == "201" {
			owner, _ := json.Marshal(tt.a.task(got).UserID)
			outcome = string(owner)
		}
		if outcome != tt.want {
			t.Errorf("%s %s: %s, want %s", tt.query, tt.body, outcome, tt.want)
		}
	}
}

// What is wrong with a query is refused by each operation, and named.
func TestQueries(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{})
	id := a.create(`{"title":"a"}`).ID
	check := func(query, every, list string) { // "" is success
		t.Helper()
		for _, op := range operations(id) {
			want := every
			if op.method == "GET" && op.path == "/api/tasks" {
				want = list
			}
			if want == "" || want == "404" && !strings.Contains(op.path, id) {
				want = op.want
			}
			if want != "204" {
				a.expect(want, op.method, op.path+query, op.body)
			}
		}
	}
	longest := "?user_id=" + strings.Repeat("%F0%9F%99%82", 255)
	check(longest, "404", "")
	for query, every := range map[string]string{"?": "", "?&": "", "?limit=1": "422 limit", "?limit=1000": "422 limit", "?completed=true": "422 completed",
		"?sort=created_at": "422 sort", "?after=" + id: "422 after"} {
		check(query, every, "")
	}
	check("?after="+id+"&after="+id, "422 after after", "422 after")
	// FuzzReadQuery has more of them.
	for want, queries := range map[string]string{
		"422 user_id": longest + "%F0%9F%99%82 ?user_id ?user_id=%00 ?user_id=\xff ?user_id=%zz ?user_id=a;b ?user_id=alice&user_id=alice ?user_id=alice&user%5Fid=bob",
		"422 colour":  "?colour=red", "422 User_id": "?User_id=alice", "422 %zz=1": "?%zz=1", "422 =1": "?=1", "422 a;b": "?a;b",
		"422 user_id user_id": longest + "%F0%9F%99%82%00",
		"422 limit":           "?limit=0 ?limit=1001 ?limit=65537 ?limit=+1", "422 completed": "?completed=1", "422 sort": "?sort=%2Bcreated_at", "422 after": "?after=1",
		"422 after colour completed limit sort user_id": "?colour=red&user_id=&completed=1&sort=title&limit=0&after=1",
	} {
		for query := range strings.FieldsSeq(queries) {
			check(query, want, want)
		}
	}
}

// §5 Conditions

// precondition is a header field of entity tags, perhaps in several lines, and
// whether version 10 is among them by the strong and by the weak comparison.
type precondition struct {
	lines        []string
	strong, weak bool
}

// header returns lines as fields with the given name, for [api.do].
func header(name string, lines []string) (header []string) {
	for _, line := range lines {
		header = append(header, name, line)
	}
	return header
}

func preconditions() []precondition {
	all := []precondition{
		{[]string{`"10"`}, true, true},
		{[]string{`W/"10"`}, false, true},
		{[]string{`*`}, true, true},
		{[]string{" \t* "}, true, true},
		{[]string{`"1", "10", "9"`}, true, true},
		{[]string{"\"9\" \t,,\"\",\t \"10\","}, true, true},
		{[]string{`"9", W/"10"`}, false, true},
		{[]string{``, `"9"`, `"10"`}, true, true},
		{[]string{strings.Repeat(`"7", `, 10_000) + `"10"`}, true, true},
		{[]string{`"a,b", "10"`}, true, true},
		{[]string{"\"\xff!#~\", \"10\""}, true, true},
		{[]string{`*`, `"10"`}, false, false},
		{[]string{`10`, `"10"`}, false, false},
	}
	for _, line := range []string{
		`"9"`, `"1"`, `"100"`, `w/"10"`, `W/ "10"`, `"*"`, `*, "10"`, `"10", *`, `*,`, `*, *`, `"1", "9"`, `"9,"10","`, `",10,"`, `""`, `"1 0", "10"`,
		`"010"`, `"+10", "-10"`, `" 10 "`, `"0xA", "1e1", "10.0", "１０"`, `"9223372036854775807", "9223372036854775808"`, `"18446744073709551626"`,
		``, `,,`, `10`, `'10'`, `"10`, `10"`, `"9" "10"`, `"10"x`, `x"10"`, `"10", x`, `"9"; "10"`,
	} {
		all = append(all, precondition{[]string{line}, false, false})
	}
	return all
}

func TestIfMatch(t *testing.T) {
	t.Parallel()
	testConditions(t, "If-Match", func(p precondition, op wish) string {
		if p.strong {
			return op.want
		}
		return "412"
	})
}

func TestIfNoneMatch(t *testing.T) {
	t.Parallel()
	testConditions(t, "If-None-Match", func(p precondition, op wish) string {
		switch {
		case !p.weak:
			return op.want
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
		id := a.create(`{"title":"old"}`).ID
		path := "/api/tasks/" + id
		for _, op := range append([]wish{{"HEAD", path, "", "200"}, {"PATCH", path, "{}", "200"}}, operations(id)[2:]...) {
			a.exec("UPDATE tasks SET title = 'old', completed = false, version = 10 WHERE id = $1", id)
			want := want(tt, op)
			got := a.expect(want, op.method, op.path, op.body, header(field, tt.lines)...)
			if tag := got.Header.Get("ETag"); tag != `"10"` && (want == "304" || want == "200" && (op.method == "GET" || op.method == "HEAD" || op.body == "{}")) {
				t.Errorf("%s %s: ETag %s", op.method, op.path, tag)
			}
			if got := a.do("GET", path, ""); want == "412" && brief(a.task(got)) != `"old" null false v10` {
				t.Errorf("%s %s: 412, but it is now %s", op.method, op.path, got.body)
			}
			a.expect("404", op.method, strings.Replace(op.path, id, noTask, 1), op.body, header(field, tt.lines)...)
		}
	}
	// Lists and creations ignore it.
	a.expect("200", "GET", "/api/tasks", "", field, `"1"`)
	a.expect("201", "POST", "/api/tasks", `{"title":"a"}`, field, "*")
}

// If-Match comes first (RFC 9110 §13.2.2), and a tag that proxies have changed is
// told from the tag of another version.
func TestConditionsTogether(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{})
	id := a.create(`{"title":"a"}`).ID
	const another, send = "another version", `send "<version>"`
	for _, tt := range []struct{ match, noneMatch, get, change, detail string }{
		{`"1"`, `"2"`, "200", "200", ""},
		{`"1"`, `"1"`, "304", "412", another},
		{`"2"`, `"1"`, "412", "412", another},
		{`"2"`, "*", "412", "412", another},
		{`W/"1"`, `""`, "412", "412", send},
		{`"1-gzip"`, `""`, "412", "412", send},
		{`1`, `""`, "412", "412", send},
		{`"-1", "0", "01"`, `""`, "412", "412", send},
		{``, `""`, "412", "412", send},
		{`W/"1", "2"`, `""`, "412", "412", another},
	} {
		for _, op := range append(changes(id), wish{"GET", "/api/tasks/" + id, "", ""}) {
			want := tt.change
			if op.method == "GET" {
				want = tt.get
			} else if op.method == "DELETE" && want == "200" {
				continue
			}
			got := a.expect(want, op.method, op.path, op.body, "If-Match", tt.match, "If-None-Match", tt.noneMatch)
			if want == "412" && !strings.Contains(a.detail(got), tt.detail) {
				t.Errorf("%s, %s, %s: %s", op.method, tt.match, tt.noneMatch, got.body)
			}
			a.exec("UPDATE tasks SET version = 1")
		}
	}
}

func TestIdempotencyKeyForm(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{})
	const name, bad = "Idempotency-Key", "422 Idempotency-Key"
	visible := make([]byte, '~'-'!'+1)
	for i := range visible {
		visible[i] = '!' + byte(i)
	}
	for want, all := range map[string][][]string{
		"201": {{"1"}, {string(visible)}, {strings.Repeat("k", 255)}},
		bad:   {{strings.Repeat("k", 256)}, {""}, {"a b"}, {"a\tb"}, {"é"}, {"\x80"}, {"a", "a"}, {"", "a"}},
	} {
		for _, lines := range all {
			a.expect(want, "POST", "/api/tasks", `{"title":"a"}`, header(name, lines)...)
		}
	}
	a.expect("422 #/colour #/title Idempotency-Key", "POST", "/api/tasks", `{"title":"","colour":1}`, name, "")
	a.expect("400", "POST", "/api/tasks", `{"title":`, name, "")
	// On other operations it has no meaning, but a repeat of a flip would flip back.
	path := "/api/tasks/" + a.create(`{"title":"a"}`).ID
	for _, op := range operations(strings.TrimPrefix(path, "/api/tasks/"))[1:] {
		for _, lines := range [][]string{{"k"}, {"", " "}} {
			if op.path == path+"/complete" {
				a.expect("200", op.method, op.path, `{"completed":false}`, header(name, lines)...)
				op.want = bad
			}
			if op.method != "DELETE" || lines[0] == "" {
				a.expect(op.want, op.method, op.path, op.body, header(name, lines)...)
			}
		}
	}
}

// §6 Bodies

// FuzzDecode has more of them.
func TestMalformedBodies(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{})
	id := a.create(`{"title":"a"}`).ID
	for _, body := range []string{
		" ", `{"title":"a"`, `{"title":"a"} {}`, `{"title":"a",}`, "\ufeff" + `{"title":"a"}`, "{\"title\":\"a\nb\"}", "{\"title\":\"a\x00b\"}",
		"{\"title\":\"a\xff\"}", "{\"title\":\"a\",\"id\":[\"\xff\"]}", `{"title":"\ud83dx"}`, `{"title":"\ude00"}`, `{"title":"a","id":{"x":["\ud83d"]}}`,
		`{"title":"a","title":"a"}`, `{"title":"a","\u0074itle":"a"}`, "{\"title\" :\"a\",\"title\"\t:\"a\"}", "{\"title\"\r:\"a\",\"title\"\n:\"a\"}", `{"title":"a","id":[{"x":[{"y":1,"y":1}]}]}`,
		`{"title":"a","id":` + strings.Repeat("[", 10_000) + strings.Repeat("]", 10_000) + `}`, strings.Repeat(`{"":`, 20_000),
	} {
		for _, op := range withBody(id) {
			a.expect("400", op.method, op.path, body)
		}
	}
	for _, op := range withBody(id)[:3] {
		a.expect("400", op.method, op.path, "", "Content-Type", "text/plain") // no body needs no type
	}
	// What comes close to it is well formed.
	for _, body := range []string{
		`{"title":"a","id":` + strings.Repeat("[", 9999) + strings.Repeat("]", 9999) + `}`,
		`{"title":"a","id":{"x":{"x":[{"x":1},{"x":1}]},"title":1}}`,
		`{"title":"\\ud83d\ud83d\ude00\uFFFD\uD83D\uDE00","id":"\\\\u"}`,
		"\t\r\n {\t\r\n \"title\"\t\r\n :\t\r\n \"a\"\t\r\n }\t\r\n ",
	} {
		a.create(body)
	}
}

func TestInvalidBodies(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{})
	id := a.create(`{"title":"a"}`).ID
	const title, description, completed, owner = " #/title", " #/description", " #/completed", " #/user_id"
	for _, tt := range []struct{ body, post, put, patch, complete string }{ // "" is success
		{`[{"title":"a","completed":true}]`, " #", " #", " #", " #"},
		{`null`, " #", " #", " #", " #"},
		{` 1 `, " #", " #", " #", " #"},
		{`{}`, title, title, "", completed},
		{`{"\u0074\u0069tle":"\u0061","completed":true}`, "", "", "", title},
		{`{"title":null,"completed":null}`, completed + title, completed + title, completed + title, completed + title},
		{`{"title":{"title":"a"},"completed":1}`, completed + title, completed + title, completed + title, completed + title},
		{`{"title":" \t\r\n\f\u000b\u0085\u00a0\u1680\u2000\u2028\u2029\u202f\u205f\u3000"}`, title, title, title, completed + title},
		{`{"title":"\u200b\ufeff\u180e"}`, "", "", "", completed + title},
		{`{"title":"\u0000"}`, title, title, title, completed + title},
		{`{"title":"` + strings.Repeat(" ", 201) + `"}`, title + title, title + title, title + title, completed + title},
		{`{"title":"a","TITLE":"b","Completed":true}`, " #/Completed #/TITLE", " #/Completed #/TITLE", " #/Completed #/TITLE", " #/Completed #/TITLE" + completed + title},
		{`{"title":"a","description":" ","user_id":" "}`, "", "", "", completed + description + title},
		{`{"title":"a","description":1,"completed":"true"}`, completed + description, completed + description, completed + description, completed + description + title},
		{`{"title":"a","description":"\u0000"}`, description, description, description, completed + description + title},
		{`{"completed":true,"title":"a","user_id":""}`, owner, "", "", title},
		{`{"completed":true,"title":"a","user_id":1}`, owner, "", "", title},
		{`{"completed":true,"title":"a","user_id":"\u0000"}`, owner, "", "", title},
		{`{"completed":true,"id":1,"user_id":null,"version":"x","created_at":null,"updated_at":[{}]}`, title, title, "", ""},
		{`{"completed":true,"title":"a","ID":1,"idempotency_key":"k","":null}`,
			" #/ #/ID #/idempotency_key", " #/ #/ID #/idempotency_key", " #/ #/ID #/idempotency_key", " #/ #/ID #/idempotency_key" + title},
	} {
		for i, op := range withBody(id) {
			want := op.want
			if places := []string{tt.post, tt.put, tt.patch, tt.complete}[i]; places != "" {
				want = "422" + places
			}
			a.expect(want, op.method, op.path, tt.body)
		}
	}
}

func TestBodySize(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{})
	const limit = 128 << 10
	for _, op := range withBody(a.create(`{"title":"a"}`).ID) {
		body := strings.TrimSuffix(op.body, "}")
		body += strings.Repeat(" ", limit-len(body)-1) + "}"
		a.expect(op.want, op.method, op.path, body)
		a.expect("413", op.method, op.path, body+" ")
		chunk := fmt.Sprintf("Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n", limit, body)
		for _, tt := range []struct{ name, rest, want string }{
			{"in a chunk", chunk + "0\r\n\r\n", op.want},
			// The responses to these come although the bodies have no end.
			{"in a chunk, and one byte more", chunk + "2\r\n ", "413"},
			{"none of it sent", fmt.Sprintf("Content-Length: %d\r\nExpect: 100-continue\r\n\r\n", limit+1), "413"},
			{"huge", fmt.Sprintf("Content-Length: %d\r\n\r\n", int64(1)<<60), "413"},
		} {
			got := a.sendRaw(op.method + " " + op.path + " HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\n" + tt.rest).answer(op.method)
			if outcome := a.outcome(got); outcome != tt.want || got.Close != (tt.want == "413") {
				t.Errorf("%s %s, %s: %s %s", op.method, op.path, tt.name, got.Status, got.Header)
			}
		}
	}
	a.listen(http.MaxBytesHandler(a.Handler, 20)) // a host's own limit
	a.expect("201", "POST", "/api/tasks", `{"title":"a"}`)
	if got := a.expect("413", "POST", "/api/tasks", `{"title":"longer than it"}`); !strings.Contains(a.detail(got), " 20 bytes") {
		t.Errorf("%s", got.body)
	}
}

// A body that does not come is answered, and occupies no slot meanwhile.
func TestSlowBody(t *testing.T) {
	t.Parallel()
	const head = "POST /api/tasks HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\n"
	const short, chunked = head + "Content-Length: 13\r\n\r\n{\"title\":", head + "Transfer-Encoding: chunked\r\n\r\n"
	for _, tt := range []struct {
		name, sent string
		then       func(a *api, c *rawConn)
		want       string
	}{
		{"stays away", head + "Content-Length: 13\r\nExpect: 100-continue\r\n\r\n", func(a *api, c *rawConn) {
			if got := c.answer("POST"); got.StatusCode != 100 {
				a.Error(got.Status)
			}
			a.create(`{"title":"a"}`) // meanwhile
		}, "408"},
		{"stops", short, nil, "408"},
		{"stops in a chunk", chunked + "5\r\n{\"tit", nil, "408"},
		{"stops between chunks", chunked + "5\r\n{\"tit\r\n", nil, "408"},
		{"stops, of a GET", "GET /api/tasks HTTP/1.1\r\nHost: h\r\nContent-Length: 13\r\n\r\n{", nil, "408"},
		{"breaks off", short, func(_ *api, c *rawConn) { c.Conn.(*net.TCPConn).CloseWrite() }, "499"},
		{"is not in chunks", chunked + "x\r\n", nil, "400"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			a := newAPI(t, Options{RequestTimeout: 3 * time.Second, MaxInFlight: 1})
			c := a.sendRaw(tt.sent)
			if tt.then != nil {
				tt.then(a, c)
			}
			got := c.answer("POST")
			if a.outcome(got) != tt.want || !got.Close || tt.want == "408" && !strings.Contains(a.detail(got), "within 2.4s") { // the rest is for the database
				t.Errorf("%s %s\n%s", got.Status, got.Header, got.body)
			}
		})
	}
}

// deadlineRecorder records the deadline of a body.
type deadlineRecorder struct {
	*httptest.ResponseRecorder
	deadline time.Time
}

func (w *deadlineRecorder) SetReadDeadline(deadline time.Time) error {
	w.deadline = deadline
	return nil
}

// The time of a body includes that of Authenticate.
func TestBodyDeadline(t *testing.T) {
	t.Parallel()
	var asked time.Time
	a := newAPI(t, Options{RequestTimeout: 10 * time.Second, Authenticate: func(*http.Request) (string, error) {
		asked = time.Now()
		return "alice", nil
	}})
	w := &deadlineRecorder{ResponseRecorder: httptest.NewRecorder()}
	r := httptest.NewRequest("POST", "/api/tasks", strings.NewReader(`{"title":"a"}`))
	r.Header.Set("Content-Type", "application/json")
	a.Handler.ServeHTTP(w, r)
	if w.Code != 201 || w.deadline.IsZero() || w.deadline.After(asked.Add(8*time.Second)) {
		t.Errorf("status %d, asked at %v, the deadline is %v", w.Code, asked, w.deadline)
	}
}

func TestMediaTypes(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{})
	id := a.create(`{"title":"a"}`).ID
	const all, merge, none = "all", "merge", "none"
	for accepted, types := range map[string][]string{
		all:   {"application/json", "application/json; charset=utf-8", "application/json ; x=\"a;b\"", "Application/JSON;charset=latin1"},
		merge: {"application/merge-patch+json", "APPLICATION/Merge-Patch+JSON; charset=utf-8"},
		none: {"", "text/plain", "application/jsonp", "application/json-patch+json", "application/x-www-form-urlencoded", "application/json, text/plain",
			"text/plain; application/json", "application /json", "application/*", "application", "; charset=utf-8"},
	} {
		for _, contentType := range types {
			for _, op := range withBody(id) {
				want, offers := op.want, map[string]string{}
				if accepted == none || accepted == merge && op.method != "PATCH" {
					want = "415"
					offers = map[string]map[string]string{"POST": {"Accept-Post": "application/json"}, "PUT": {"Accept": "application/json"},
						"PATCH": {"Accept-Patch": "application/merge-patch+json, application/json"}}[op.method]
				}
				got := a.expect(want, op.method, op.path, op.body, "Content-Type", contentType)
				for _, name := range []string{"Accept-Post", "Accept", "Accept-Patch", "Accept-Encoding"} {
					if got := got.Header.Get(name); got != offers[name] {
						t.Errorf("%s %s: %s is %q, want %q", op.method, op.path, name, got, offers[name])
					}
				}
			}
		}
	}
	for want, encodings := range map[string][][]string{
		"200": {{"identity"}, {"Identity"}, {""}, nil},
		"415": {{"gzip"}, {"GZIP"}, {"br"}, {"gzip, br"}, {"identity, gzip"}, {"identity", "gzip"}, {"gzip", "identity"}},
	} {
		for _, encoding := range encodings {
			for _, op := range withBody(id)[1:] {
				got := a.expect(want, op.method, op.path, op.body, header("Content-Encoding", encoding)...)
				if (got.Header.Get("Accept-Encoding") == "identity") != (want == "415") {
					t.Errorf("%q: %s", encoding, got.Header)
				}
			}
		}
	}
	// On operations that ignore a body only its encoding matters, and without a
	// body neither does.
	for _, op := range operations(id) {
		if op.body == "" && op.method != "PATCH" {
			a.expect("415", op.method, op.path, "ignored", "Content-Encoding", "gzip")
		}
		if op.body == "" {
			a.expect(op.want, op.method, op.path, "", "Content-Type", "text/plain", "Content-Encoding", "gzip")
		}
	}
	got := a.sendRaw("PATCH /api/tasks/" + a.create(`{"title":"a"}`).ID + "/complete HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n").answer("PATCH")
	if a.outcome(got) != "200" || !a.task(got).Completed || got.Close {
		t.Errorf("an empty chunked body: %s %s", got.Status, got.body)
	}
}

func TestRequestID(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{})
	seen := map[string]bool{}
	check := func(kept bool, lines ...string) {
		t.Helper()
		for _, path := range []string{"/healthz", "/api/tasks", "/api/tasks/x", "/nowhere", "/"} {
			got := a.do("GET", path, "", header("X-Request-ID", lines)...).Header.Get("X-Request-ID")
			if !regexp.MustCompile(`^[!-~]{1,128}$`).MatchString(got) || slices.Contains(lines, got) != kept || !kept && seen[got] {
				t.Errorf("%s, %q: %q", path, lines, got)
			}
			seen[got] = true
		}
	}
	// Gateways make them as the last one.
	for _, id := range []string{"checkout-4711", "-", `"~!`, strings.Repeat("x", 128), "Root=1-67891233-abcdef012345678912345678#a/b+c:d"} {
		check(true, id)
	}
	for _, id := range []string{strings.Repeat("x", 129), "a b", "é", "a\xff", "a\u2028b", ""} {
		check(false, id)
	}
	check(false)
	check(false, "twice", "twice")
}

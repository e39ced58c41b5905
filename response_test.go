package main

// response_test.go tests what all responses have in common: headers, problems,
// CORS, what becomes of the connection, and what log and metrics say of them.

import (
	"bytes"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"regexp"
	"strings"
	"testing"
	"time"
)

// Problems are compared in every respect by [api.outcome].
func TestHeaders(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{})
	id := a.create(`{"title":"a"}`).ID
	const json, none, page, metrics = "application/json, no-cache", ", ", "text/html; charset=utf-8, no-cache", "text/plain; version=0.0.4; charset=utf-8, no-store"
	for _, tt := range []struct{ method, path, body, ifNoneMatch, want string }{ // media type and Cache-Control
		{"POST", "/api/tasks", `{"title":"a"}`, "x", json},
		{"GET", "/api/tasks", "", "x", json},
		{"GET", "/api/tasks/" + id, "", "x", json},
		{"GET", "/api/tasks/" + id, "", "*", ", no-cache"},
		{"PUT", "/api/tasks/" + id, `{"title":"a"}`, "x", json},
		{"PATCH", "/api/tasks/" + id, `{}`, "x", json},
		{"PATCH", "/api/tasks/" + id + "/complete", "", "x", json},
		{"DELETE", "/api/tasks/" + id, "", "x", none},
		{"GET", "/healthz", "", "x", "application/json, no-store"},
		{"GET", "/readyz", "", "x", "application/json, no-store"},
		{"GET", "/openapi.json", "", "x", json},
		{"GET", "/docs", "", "x", page},
		{"GET", "/docs", "", "*", ", no-cache"},
		{"GET", "/metrics", "", "x", metrics},
		{"GET", "/", "", "x", none},
	} {
		h := a.do(tt.method, tt.path, tt.body, "If-None-Match", tt.ifNoneMatch).Header
		if got := h.Get("Content-Type") + ", " + h.Get("Cache-Control"); got != tt.want || h.Get("X-Content-Type-Options") != "nosniff" ||
			h.Get("Vary")+h.Get("Access-Control-Allow-Origin")+h.Get("Connection") != "" {
			t.Errorf("%s %s: %s", tt.method, tt.path, h)
		}
	}
	// JSON has the characters special to HTML as themselves, in problems too.
	for path, want := range map[string]string{"/api/tasks/%3C&%3E": `\"<&>\"`, "/api/tasks?%3C%26%3E=1": `"parameter":"<&>"`} {
		if got := a.do("GET", path, ""); !bytes.Contains(got.body, []byte(want)) {
			t.Errorf("%s: %s", path, got.body)
		}
	}
}

// A defect is 500. The client learns nothing of it; the log has its cause.
func TestDefect(t *testing.T) {
	t.Parallel()
	const secret, origin = "do-not-tell", "https://app.example"
	for log, make := range map[string]func(a *api){
		"nil pointer dereference": func(a *api) { a.store = &Store{} },
		"strange":                 func(a *api) { a.exec("ALTER TABLE tasks ADD CONSTRAINT strange CHECK (false) NOT VALID") },
		"description":             func(a *api) { a.exec("ALTER TABLE tasks RENAME description TO summary") },
	} {
		t.Run(log, func(t *testing.T) {
			t.Parallel()
			a := newAPI(t, Options{CORSOrigins: []string{origin}, MaxInFlight: 1})
			a.log.expected.Store(true)
			make(a)
			for range 2 { // the first gives its slot back
				got := a.expect("500", "POST", "/api/tasks", `{"title":"`+secret+`"}`, "Origin", origin, "X-Request-ID", "r-1")
				if got.Header.Get("X-Request-ID") != "r-1" || got.Header.Get("Access-Control-Allow-Origin") != origin ||
					strings.Contains(string(got.body), log) || strings.Contains(string(got.body), secret) {
					t.Errorf("%s\n%s", got.Header, got.body)
				}
			}
			a.expect("200", "GET", "/healthz", "")
			a.server.Close() // waits for the log
			all := a.log.String()
			if lines := strings.Count(all, "level=ERROR msg=request method=POST route=/api/tasks status=500 "); lines != 2 || strings.Count(all, "request_id=r-1 error=") != 2 ||
				strings.Count(all, log) < 2 || strings.Contains(all, secret) {
				t.Errorf("logged:\n%s", all)
			}
		})
	}
}

// CORS

func TestCORS(t *testing.T) {
	t.Parallel()
	const app, other = "https://app.example", "https://other.example"
	off := newAPI(t, Options{})
	off.log.expected.Store(true)
	named, all := off.with(Options{CORSOrigins: []string{"https://first.example", app}}), off.with(Options{CORSOrigins: []string{"*"}})
	id := off.create(`{"title":"a"}`).ID
	for _, tt := range []struct {
		name    string
		a       *api
		origins []string
		allowed bool
		vary    string
	}{
		{"off", off, []string{"", app}, false, ""},
		{"named", named, []string{app}, true, "Origin"},
		{"unnamed", named, []string{"", other, "https://APP.example", "http://app.example", app + ":8443", "https://x.app.example", app + ".evil.example", "null", "*"}, false, "Origin"},
		{"all", all, []string{other, "null", "*"}, true, "Origin"},
		{"all, but no origin", all, []string{""}, false, "Origin"},
	} {
		for _, origin := range tt.origins {
			var header []string
			want, credentials, exposed, preflight := "", "", "", "405"
			if origin != "" {
				header = []string{"Origin", origin, "Sec-Fetch-Site", "cross-site"}
			}
			if tt.allowed {
				want, exposed, preflight = origin, "ETag, Idempotency-Replayed, Link, Location, Retry-After, WWW-Authenticate, X-Request-ID", "204"
			}
			if want == app {
				credentials = "true"
			}
			check := func(status, method, path, body string, more ...string) {
				t.Helper()
				h := tt.a.expect(status, method, path, body, append(header, more...)...).Header
				if h.Get("Access-Control-Allow-Origin") != want || elements(h.Get("Access-Control-Expose-Headers")) != exposed || h.Get("Vary") != tt.vary ||
					h.Get("Access-Control-Allow-Credentials") != credentials {
					t.Errorf("%s, %s: %s %s: %s", tt.name, origin, method, path, h)
				}
			}
			for path, status := range map[string]string{"/": "307", "/healthz": "200", "/docs": "200", "/nowhere": "404", "//": "404", "/api/tasks": "200",
				"/api/tasks/" + id: "200", "/api/tasks/x": "404", "/api/tasks?x": "422 x", "/api/tasks/" + id + "/complete": "405"} {
				check(status, "GET", path, "")
			}
			check(preflight, "OPTIONS", "/api/tasks", "", "Access-Control-Request-Method", "POST")
			for _, op := range append(changes(tt.a.create(`{"title":"a"}`).ID), operations(id)[0]) {
				if origin != "" && !tt.allowed {
					op.want = "403"
				}
				check(op.want, op.method, op.path, op.body)
			}
		}
	}
}

func TestPreflight(t *testing.T) {
	t.Parallel()
	const app, asked = "https://app.example", "authorization, traceparent"
	a := newAPI(t, Options{CORSOrigins: []string{app}})
	for path, methods := range map[string]string{
		"/api/tasks": "GET, HEAD, POST", "/api/tasks/": "GET, HEAD, POST", "/api/tasks/" + noTask: "DELETE, GET, HEAD, PATCH, PUT",
		"/api/tasks/" + noTask + "/complete": "PATCH", "/readyz": "GET, HEAD", "/nowhere": "", "/api//tasks": "", "/api/tasks/x/y": "",
	} {
		want := map[bool]string{true: "204", false: "404"}[methods != ""]
		header := []string{"Origin", app, "Access-Control-Request-Method", "PUT"}
		h := a.expect(want, "OPTIONS", path, "", append(header, "Access-Control-Request-Headers", asked)...).Header
		if want == "204" && (elements(h.Get("Access-Control-Allow-Methods")) != methods || h.Get("Access-Control-Allow-Headers") != asked || h.Get("X-Request-ID") == "" ||
			h.Get("X-Content-Type-Options") != "nosniff" || h.Get("Allow") != "" || h.Get("Content-Type") != "" || !regexp.MustCompile("^[1-9][0-9]*$").MatchString(h.Get("Access-Control-Max-Age"))) {
			t.Errorf("%s: %s", path, h)
		}
		if h := a.expect(want, "OPTIONS", path, "", header...).Header; h["Access-Control-Allow-Headers"] != nil {
			t.Errorf("%s allows headers that were not asked for: %s", path, h)
		}
	}
	a.expect("405", "OPTIONS", "/api/tasks", "", "Origin", app) // is no preflight
}

func TestCrossOrigin(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{})
	check := func(refused bool, site, origin string) {
		t.Helper()
		var header []string
		if site != "" {
			header = append(header, "Sec-Fetch-Site", site)
		}
		if origin != "" {
			header = append(header, "Origin", origin)
		}
		id := a.create(`{"title":"a"}`).ID
		for _, op := range operations(id) {
			want := op.want
			if refused && op.method != "GET" {
				want = "403"
			}
			got := a.expect(want, op.method, op.path, op.body, header...)
			if want == "403" && !(strings.Contains(a.detail(got), "CORS_ORIGINS") && strings.Contains(a.detail(got), got.Request.Host)) {
				t.Errorf("%s", got.body)
			}
		}
		if now := a.do("GET", "/api/tasks/"+id, ""); refused && brief(a.task(now)) != `"a" null false v1` {
			t.Errorf("%s changed it to %s", header, now.body)
		}
	}
	for _, site := range []string{"same-site", "cross-site", "other"} {
		check(true, site, "https://evil.example")
		check(true, site, "")
	}
	check(false, "", "") // no browser
	check(false, "none", "")
	check(false, "same-origin", a.url)
	check(false, "same-origin", "https://api.example") // behind a proxy
	check(true, "same-site", a.url)
	// Old browsers.
	check(false, "", a.url)
	for _, origin := range []string{"https://evil.example", "http://127.0.0.1:1", "null"} {
		check(true, "", origin)
	}
}

// Connections

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

// A client that sends the whole of a body before it reads gets the response,
// though it is about something else and the end of the connection asked for.
func TestAnswerBeforeBody(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{})
	for request, want := range map[string]string{"POST /api/tasks": "413", "POST /nope": "404", "PUT /healthz": "405"} {
		for range 20 {
			c := a.sendRaw(request + " HTTP/1.1\r\nHost: h\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: 1000000\r\n\r\n")
			if _, err := io.WriteString(c, strings.Repeat(" ", 1_000_000)); err != nil {
				t.Errorf("%s: %v", request, err)
			} else if got := a.outcome(c.answer("POST")); got != want {
				t.Errorf("%s: %s, want %s", request, got, want)
			}
		}
	}
}

// A client that closes the connection, or its side of it, is no fault of the
// service: its request is 499, whatever it was waiting for.
func TestClientGone(t *testing.T) {
	t.Parallel()
	a := newAPIOn(t, newDatabase(t), Options{})
	id := a.create(`{"title":"a"}`).ID
	lockTasks(t, a.dbURL, lockRow, id)
	entered := make(chan struct{}, 1)
	guarded := a.with(Options{Authenticate: func(r *http.Request) (string, error) {
		entered <- struct{}{}
		<-r.Context().Done()
		return "", r.Context().Err()
	}})
	flip := "PATCH /api/tasks/" + id + "/complete HTTP/1.1\r\nHost: h\r\n"
	const incomplete = "Content-Type: application/json\r\nContent-Length: 20\r\n\r\n{"
	for _, tt := range []struct {
		name, request string
		a             *api
		await         func()
	}{
		{"statement", flip + "\r\n", a, func() { waitFor(t, "the statement to wait", func() bool { return waiting(t, a.dbURL) == 1 }) }},
		{"authentication", flip + "\r\n", guarded, func() { <-entered }},
		{"body", flip + incomplete, a, func() {}},
	} {
		for name, leave := range map[string]func(*net.TCPConn){
			"close": func(c *net.TCPConn) { c.Close() },
			"reset": func(c *net.TCPConn) { c.SetLinger(0); c.Close() },
			"half":  func(c *net.TCPConn) { c.CloseWrite() },
		} {
			requestID := tt.name + "-" + name
			c := tt.a.sendRaw(strings.Replace(tt.request, "Host: h", "Host: h\r\nX-Request-ID: "+requestID, 1))
			tt.await()
			leave(c.Conn.(*net.TCPConn))
			if name == "half" {
				if got := a.outcome(c.answer("PATCH")); got != "499" {
					t.Errorf("%s: %s", requestID, got)
				}
			}
			waitFor(t, "the log of "+requestID, func() bool { return strings.Contains(a.log.String(), "request_id="+requestID+"\n") })
			if line := regexp.MustCompile(".*request_id=" + requestID).FindString(a.log.String()); !strings.Contains(line, "level=INFO") || !strings.Contains(line, "status=499") {
				t.Errorf("logged: %s", line)
			}
			waitFor(t, "the statement to end", func() bool { return waiting(t, a.dbURL) == 0 })
		}
	}
	for a, want := range map[*api]float64{a: 6, guarded: 3} {
		counted := parseMetrics(t, a.do("GET", "/metrics", "").body)
		if got := counted[`http_requests_total{route="/api/tasks/{id}/complete",method="PATCH",status="499"}`]; got != want {
			t.Errorf("%v requests are counted as 499, want %v", got, want)
		}
	}
}

// Log and metrics

// So it is with HTTP/2, where a stream is reset.
func TestClientGoneHTTP2(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{})
	server := httptest.NewUnstartedServer(a.Handler)
	server.EnableHTTP2 = true
	server.StartTLS()
	defer server.Close()
	ctx, cancel := context.WithCancel(t.Context())
	body, sender := io.Pipe()
	go func() {
		io.WriteString(sender, "{")
		waitFor(t, "the request to arrive", func() bool { return a.Handler.metrics.inFlight.Load() == 1 })
		cancel()
	}()
	req, _ := http.NewRequestWithContext(ctx, "POST", server.URL+"/api/tasks", body)
	req.Header.Set("Content-Type", "application/json")
	if resp, err := server.Client().Do(req); !errors.Is(err, context.Canceled) {
		t.Errorf("%v, %v", resp, err)
	}
	waitFor(t, "its status", func() bool {
		return bytes.Contains(a.Handler.metrics.appendTo(nil, sql.DBStats{}), []byte(`method="POST",status="499"} 1`))
	})
}

// One line a request, with what the contract names and never a body.
func TestLog(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{})
	const secret = "do-not-tell"
	id := a.create(`{"title":"`+secret+`"}`, "X-Request-ID", "r").ID
	var want []string
	for i, tt := range []struct{ method, path, body, route, status string }{
		{"GET", "/api/tasks/", "", "/api/tasks", "200"},
		{"GET", "/api/tasks?user_id=" + secret, "", "/api/tasks", "200"},
		{"GET", "/api/tasks/" + id, "", "/api/tasks/{id}", "200"},
		{"PUT", "/api/tasks/" + id, `{"title":"` + secret + `","description":1}`, "/api/tasks/{id}", "422"},
		{"PATCH", "/api/tasks/" + id, `{"` + secret, "/api/tasks/{id}", "400"},
		{"PATCH", "/api/tasks/" + id + "/complete", "", "/api/tasks/{id}/complete", "200"},
		{"DELETE", "/api/tasks", "", "unmatched", "405"},
		{"GET", "/" + secret, "", "unmatched", "404"},
		{"GET", "/", "", "/{$}", "307"},
		{"HEAD", "/healthz", "", "/healthz", "200"},
	} {
		got := a.do(tt.method, tt.path, tt.body, "X-Request-ID", fmt.Sprintf("r%d", i))
		want = append(want, fmt.Sprintf(`(?m)^time=\S+ level=INFO msg=request method=%s route=%s status=%s duration_ms=[0-9.]+ bytes=%d request_id=r%d$`,
			tt.method, regexp.QuoteMeta(tt.route), tt.status, len(got.body), i))
	}
	a.server.Close() // waits for the log
	log := a.log.String()
	if a.Handler.log(httptest.NewRequest("GET", "/", nil), "/", 200, 1234*time.Microsecond, 0, "r", nil); !strings.Contains(a.log.String(), " duration_ms=1.234 ") {
		t.Error("the unit is not a millisecond")
	}
	for _, line := range want {
		if n := len(regexp.MustCompile(line).FindAllString(log, -1)); n != 1 || strings.Count(log, "\n") != len(want)+1 || strings.Contains(log, secret) {
			t.Errorf("%d lines are %s in\n%s", n, line, log)
		}
	}
}

func TestMetrics(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{})
	id := a.create(`{"title":"a"}`).ID
	for _, request := range strings.Split("GET /api/tasks, GET /api/tasks/, GET /api/tasks?limit=5, GET /api/tasks/"+id+", GET /api/tasks/x, GET /api/tasks/"+noTask+
		", GET /x, GET /y, GET /, HEAD /api/tasks, PATCH /api/tasks/"+id+"/complete, DELETE /api/tasks, BREW /api/tasks", ", ") {
		method, path, _ := strings.Cut(request, " ")
		a.do(method, path, "")
	}
	a.server.Close() // waits until all are counted
	page := httptest.NewRecorder()
	a.ServeHTTP(page, httptest.NewRequest("GET", "/metrics", nil))
	all := parseMetrics(t, page.Body.Bytes())
	want := map[string]float64{
		`http_requests_total{route="/api/tasks",method="POST",status="201"}`:                1,
		`http_requests_total{route="/api/tasks",method="GET",status="200"}`:                 3,
		`http_requests_total{route="/api/tasks",method="HEAD",status="200"}`:                1,
		`http_requests_total{route="/api/tasks/{id}",method="GET",status="200"}`:            1,
		`http_requests_total{route="/api/tasks/{id}",method="GET",status="404"}`:            2,
		`http_requests_total{route="/api/tasks/{id}/complete",method="PATCH",status="200"}`: 1,
		`http_requests_total{route="/{$}",method="GET",status="307"}`:                       1,
		`http_requests_total{route="unmatched",method="GET",status="404"}`:                  2,
		`http_requests_total{route="unmatched",method="DELETE",status="405"}`:               1,
		`http_requests_total{route="unmatched",method="other",status="405"}`:                1,
		`http_request_duration_seconds_count{route="/api/tasks",method="GET",status="200"}`: 3,
		"http_requests_in_flight":     1, // that for the page
		"go_sql_max_open_connections": 10,
	}
	got := maps.Clone(all)
	maps.DeleteFunc(got, func(series string, _ float64) bool {
		return want[series] == 0 && !strings.HasPrefix(series, "http_requests_total{")
	})
	if !maps.Equal(got, want) {
		t.Errorf("got  %v\nwant %v", got, want)
	}
}

// Package tasks keeps tasks in PostgreSQL and serves them as a REST API, which
// openapi.json describes: [OpenDB] connects, a [Store] keeps the tasks, a
// [Handler] serves them under any router, and a [Server] stops without losing a
// request.
package main

// handler.go is the API: the options, the routes, and what each operation does,
// in the order of the routes. request.go has what comes before an operation,
// response.go what comes after it.

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/base64"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"time"
)

//go:embed openapi.json
var openAPI []byte

//go:embed docs.html
var docs []byte

// Options are the settings of a [Handler]. The zero value means the defaults, and
// so do numbers and durations below zero.
type Options struct {
	RequestTimeout time.Duration // deadline of one request; default 5 s; must not exceed 45 s, or a Server cuts the response off
	MaxInFlight    int           // API requests served at once; default 1000

	// Authenticate returns the user who sent a request to the API. It is called
	// before the body is read, from many goroutines, and the request's context has
	// its deadline. The user sees and changes only their own tasks. An error is
	// 401, which asks for a Bearer token, or 503 if it wraps [ErrUnavailable];
	// clients never see its text. A user who cannot own tasks, such as "", is 403.
	// If Authenticate reads the body, it must replace r.Body. Default nil: nothing
	// is authenticated.
	Authenticate func(*http.Request) (userID string, err error)

	// Hosts are the names that requests may have as Host, without port, or "*".
	// Localhost and IP addresses are always served. Default: any.
	Hosts []string

	// Prefix is the path below which clients see the API, such as "/todo". A
	// proxy or [http.StripPrefix] removes it from requests. Default: none.
	Prefix string

	CORSOrigins []string     // origins that browsers may send requests from, or "*"; default none
	Logger      *slog.Logger // default slog.Default()
}

// Handler serves the API on a [Store]. It may be mounted in any [http.Server].
type Handler struct {
	store    *Store
	opts     Options
	mux      *http.ServeMux
	slots    chan struct{} // has an element for each API request that is served
	metrics  metrics
	draining atomic.Bool
}

// NewHandler returns a Handler on a store whose Migrate has succeeded. It does not
// check opts.
func NewHandler(store *Store, opts Options) *Handler {
	opts.RequestTimeout = cmp.Or(max(opts.RequestTimeout, 0), 5*time.Second)
	opts.MaxInFlight = cmp.Or(max(opts.MaxInFlight, 0), 1000)
	opts.Logger = cmp.Or(opts.Logger, slog.Default())
	h := &Handler{store: store, opts: opts, mux: http.NewServeMux(), slots: make(chan struct{}, opts.MaxInFlight)}
	for _, rt := range h.routes() {
		h.mux.Handle(rt.pattern, rt)
	}
	return h
}

// Drain makes /readyz answer 503, so that load balancers send no more requests.
// Requests are still served.
func (h *Handler) Drain() { h.draining.Store(true) }

// ServeHTTP answers a request.
func (h *Handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	h.find(r).ServeHTTP(w, r)
}

// endpoint answers a request: it returns a response, or an error that problemOf
// turns into one. If there is an error, the response is ignored.
type endpoint func(w http.ResponseWriter, r *http.Request) (*response, error)

// route is a pattern of [http.ServeMux] and its endpoint.
type route struct {
	h       *Handler
	pattern string
	serve   endpoint
}

func (h *Handler) routes() []*route {
	scope, page := []string{"user_id"}, []string{"user_id", "completed", "sort", "limit", "after"}
	whole, patch := []string{mediaTypeJSON}, []string{mediaTypePatch, mediaTypeJSON}
	docsPage, serverURL := newPage("text/html; charset=utf-8", docs), `"url": "`+cmp.Or(h.opts.Prefix, "/")+`"`
	docsPage.header.Set("Content-Security-Policy", contentPolicy(docsPage.body))
	apiPage := newPage(mediaTypeJSON, bytes.Replace(openAPI, []byte(`"url": "/"`), []byte(serverURL), 1))
	return []*route{
		{h, "POST /api/tasks", h.api(h.createTask, scope, whole)},
		{h, "GET /api/tasks", h.api(h.listTasks, page, nil)},
		{h, "GET /api/tasks/{id}", h.api(h.getTask, scope, nil)},
		{h, "PUT /api/tasks/{id}", h.api(h.changeTask(decodeReplacement), scope, whole)},
		{h, "PATCH /api/tasks/{id}", h.api(h.changeTask(decodeTaskPatch), scope, patch)},
		{h, "PATCH /api/tasks/{id}/complete", h.api(h.completeTask, scope, patch)},
		{h, "DELETE /api/tasks/{id}", h.api(h.deleteTask, scope, nil)},
		{h, "GET /healthz", h.health},
		{h, "GET /readyz", h.ready},
		{h, "GET /openapi.json", apiPage.serve},
		{h, "GET /docs", docsPage.serve},
		{h, "GET /metrics", h.writeMetrics},
		{h, "GET /{$}", h.root},
	}
}

// noRoute is the pattern of requests without a route.
const noRoute = "unmatched"

// find returns the route of a request. It ignores one trailing slash of an API
// path: a redirect would lose the body of a POST.
func (h *Handler) find(r *http.Request) *route {
	escaped := r.URL.EscapedPath()
	if strings.HasPrefix(r.URL.Path, "/api/") && strings.HasSuffix(escaped, "/") {
		u := *r.URL
		u.Path, u.RawPath = strings.TrimSuffix(u.Path, "/"), strings.TrimSuffix(u.RawPath, "/")
		r = &http.Request{Method: r.Method, URL: &u}
	}
	// Any other handler is ServeMux's own: a redirect, or a plain-text 404 or 405.
	handler, _ := h.mux.Handler(r)
	rt, ok := handler.(*route)
	// ServeMux matches an encoded slash with {$}.
	if !ok || strings.HasSuffix(rt.pattern, "{$}") && escaped != "/" {
		return &route{h, noRoute, h.unmatched}
	}
	return rt
}

// unmatched answers a request without a route: a preflight of CORS (Fetch
// standard, §3.3), a wrong method, or a wrong path.
func (h *Handler) unmatched(w http.ResponseWriter, r *http.Request) (*response, error) {
	var methods []string
	for _, method := range []string{"DELETE", "GET", "HEAD", "PATCH", "POST", "PUT"} {
		if h.find(&http.Request{Method: method, URL: r.URL}).pattern != noRoute {
			methods = append(methods, method)
		}
	}
	allow := strings.Join(methods, ", ")
	switch {
	case methods == nil:
		return nil, refuse(http.StatusNotFound, "Not found.")
	case r.Method == http.MethodOptions && h.originNamed(r) && r.Header.Get("Access-Control-Request-Method") != "":
		return &response{status: http.StatusNoContent, header: http.Header{
			"Access-Control-Allow-Methods": {allow},
			"Access-Control-Allow-Headers": r.Header.Values("Access-Control-Request-Headers"),
			"Access-Control-Max-Age":       {"7200"}, // seconds; browsers allow no more
		}}, nil
	}
	return nil, refuse(http.StatusMethodNotAllowed, "The method %s is not allowed here.", r.Method).with("Allow", allow)
}

func (h *Handler) createTask(r *request) (*response, error) {
	d, err := decodeTaskDraft(r.body)
	key, err := r.checkDraft(&d.UserID, err)
	if err != nil {
		return nil, err
	}
	t, replayed, err := h.store.Create(r.Context(), d, key)
	return created(r, t, replayed, err)
}

func (h *Handler) listTasks(r *request) (*response, error) {
	page, more, err := h.store.List(r.Context(), r.Filter)
	return listed(r, page, more, err)
}

func (h *Handler) getTask(r *request) (*response, error) {
	t, err := h.store.Get(r.Context(), r.target)
	return fetched(r, t, err)
}

// changeTask returns an operation that applies the patch that decode returns.
func (h *Handler) changeTask(decode func(body []byte) (TaskPatch, error)) operation {
	return func(r *request) (*response, error) {
		patch, err := decode(r.body)
		if err != nil {
			return nil, err
		}
		t, err := h.store.Patch(r.Context(), r.target, patch)
		return changed(t, err)
	}
}

func (h *Handler) completeTask(r *request) (*response, error) {
	if len(r.body) > 0 {
		return h.changeTask(decodeCompletion)(r)
	}
	if r.Header.Values("Idempotency-Key") != nil {
		return nil, InvalidError{{Header: "Idempotency-Key", Detail: `a repeat would flip the task back; send the body {"completed": true} or false instead`}}
	}
	t, err := h.store.Flip(r.Context(), r.target)
	return changed(t, err)
}

func (h *Handler) deleteTask(r *request) (*response, error) {
	return &response{status: http.StatusNoContent}, h.store.Delete(r.Context(), r.target)
}

func (h *Handler) health(http.ResponseWriter, *http.Request) (*response, error) {
	return newResponse(mediaTypeJSON, "no-store", []byte(`{"status":"ok"}`+"\n")), nil
}

func (h *Handler) ready(w http.ResponseWriter, r *http.Request) (*response, error) {
	if h.draining.Load() {
		return nil, refuse(http.StatusServiceUnavailable, "The service is shutting down.")
	}
	ctx, cancel := context.WithTimeout(r.Context(), time.Second)
	defer cancel()
	res, _ := h.health(w, r)
	return res, h.store.Ping(ctx)
}

func (h *Handler) writeMetrics(http.ResponseWriter, *http.Request) (*response, error) {
	page := h.metrics.appendTo(nil, h.store.db.Stats())
	return newResponse("text/plain; version=0.0.4; charset=utf-8", "no-store", page), nil
}

func (h *Handler) root(http.ResponseWriter, *http.Request) (*response, error) {
	return &response{status: http.StatusTemporaryRedirect, header: http.Header{"Location": {h.opts.Prefix + "/docs"}}}, nil
}

// newPage returns a document that does not change while the service runs. Its
// lines end in LF, whatever the checkout has: browsers convert them before they
// hash the script.
func newPage(mediaType string, body []byte) *response {
	body = bytes.ReplaceAll(bytes.ReplaceAll(body, []byte("\r\n"), []byte("\n")), []byte("\r"), []byte("\n"))
	page := newResponse(mediaType, "no-cache", body)
	page.header.Set("ETag", `"`+hash(body)+`"`)
	return page
}

// serve is the endpoint of a page.
func (page *response) serve(_ http.ResponseWriter, r *http.Request) (*response, error) {
	tags, star := parseTags(r.Header.Values("If-None-Match"))
	if star || slices.ContainsFunc(tags, func(tag string) bool { return strings.TrimPrefix(tag, "W/") == page.header.Get("ETag") }) {
		return &response{status: http.StatusNotModified, header: page.header}, nil
	}
	return page, nil
}

func hash(b []byte) string {
	sum := sha256.Sum256(b)
	return base64.StdEncoding.EncodeToString(sum[:])
}

// contentPolicy returns the Content-Security-Policy of a page. It allows the
// page's one script, its one style sheet, and requests to its own origin. It
// forbids markup made from text.
func contentPolicy(page []byte) string {
	source := func(element string) string {
		_, after, _ := bytes.Cut(page, []byte("<"+element+">"))
		text, _, _ := bytes.Cut(after, []byte("</"+element+">"))
		return "'sha256-" + hash(text) + "'"
	}
	return "default-src 'none'; script-src " + source("script") + "; style-src " + source("style") +
		"; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'" +
		"; require-trusted-types-for 'script'; trusted-types 'none'"
}

package main

// handler.go is the REST API: the routes, the operations in the order of the
// routes, the checks that come before them, conditional requests, and then how
// JSON, problem documents (RFC 9457) and everything around them are written. It
// knows neither SQL nor the driver.

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	_ "embed"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"os"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
	"unicode/utf8"
)

// Limits of requests.
const (
	maxBody        = 128 << 10 // bytes; the largest legal task fits, however it is escaped
	maxKey         = 255       // bytes of an Idempotency-Key
	maxRequestID   = 128       // bytes
	maxLimit       = 1000      // tasks on a page
	defaultLimit   = 100
	readyTimeout   = time.Second
	corsMaxAge     = "7200"      // seconds; browsers allow no more
	retryAfter     = "1"         // seconds
	noRoute        = "unmatched" // in logs and metrics
	mediaTypeJSON  = "application/json"
	mediaTypePatch = "application/merge-patch+json"
)

//go:embed openapi.json
var openAPI []byte

//go:embed docs.html
var docs []byte

// Options are the settings of a [Handler]. A zero field means its default.
type Options struct {
	RequestTimeout time.Duration // deadline of one request; default 5 seconds
	MaxInFlight    int           // requests on tasks served at once; default 1000
	CORSOrigins    []string      // origins that browsers may send requests from, or "*"; default none
	Logger         *slog.Logger  // default slog.Default()
}

// Handler serves the API on a [Store]. It may be mounted in any [http.Server],
// behind middleware that authenticates users and passes them on by
// [ContextWithUser].
type Handler struct {
	store    *Store
	opts     Options
	mux      *http.ServeMux
	slots    chan struct{} // one for each request on tasks that is served
	metrics  metrics
	draining atomic.Bool
}

// NewHandler returns a Handler.
func NewHandler(store *Store, opts Options) *Handler {
	opts.RequestTimeout = cmp.Or(opts.RequestTimeout, 5*time.Second)
	opts.MaxInFlight = cmp.Or(opts.MaxInFlight, 1000)
	opts.Logger = cmp.Or(opts.Logger, slog.Default())
	h := &Handler{store: store, opts: opts, mux: http.NewServeMux(), slots: make(chan struct{}, opts.MaxInFlight)}
	for _, route := range h.routes() {
		h.mux.Handle(route.pattern, route)
		if strings.HasSuffix(route.pattern, "/tasks") {
			// Served, not redirected: redirects lose the bodies of POSTs.
			h.mux.Handle(route.pattern+"/{$}", route)
		}
	}
	return h
}

// Drain makes /readyz answer 503, so that no new requests are sent here. All
// else goes on as before.
func (h *Handler) Drain() { h.draining.Store(true) }

// ContextWithUser returns a context that tells the Handler who sent a request:
// that user sees and changes only their own tasks. Middleware that has verified
// the user calls it. An empty userID is refused with 403.
func ContextWithUser(ctx context.Context, userID string) context.Context {
	return context.WithValue(ctx, userKey{}, userID)
}

type userKey struct{}

// endpoint answers requests on one route. Either it writes an answer or it
// returns an error, which [Handler.ServeHTTP] makes the answer.
type endpoint func(w http.ResponseWriter, r *http.Request) error

// route is a pattern of [http.ServeMux] and where it leads.
type route struct {
	pattern string
	serve   endpoint
}

func (rt route) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	res := w.(*response)
	_, res.route, _ = strings.Cut(rt.pattern, " ")
	var csrf http.CrossOriginProtection
	if !res.named && csrf.Check(r) != nil {
		res.err = refuse(http.StatusForbidden, "Requests from this origin are not allowed.")
		return
	}
	res.err = rt.serve(w, r)
}

func (h *Handler) routes() []route {
	var (
		scope = []string{"user_id"}
		page  = []string{"user_id", "completed", "sort", "limit", "after"}
		whole = []string{mediaTypeJSON}
		patch = []string{mediaTypePatch, mediaTypeJSON}
	)
	return []route{
		{"POST /api/tasks", h.tasks(h.createTask, scope, whole)},
		{"GET /api/tasks", h.tasks(h.listTasks, page, nil)},
		{"GET /api/tasks/{id}", h.tasks(h.getTask, scope, nil)},
		{"PUT /api/tasks/{id}", h.tasks(h.changeTask(DecodeReplacement), scope, whole)},
		{"PATCH /api/tasks/{id}", h.tasks(h.changeTask(DecodePatch), scope, patch)},
		{"PATCH /api/tasks/{id}/complete", h.tasks(h.completeTask, scope, patch)},
		{"DELETE /api/tasks/{id}", h.tasks(h.deleteTask, scope, nil)},
		{"GET /healthz", h.health},
		{"GET /readyz", h.ready},
		{"GET /openapi.json", h.openAPI},
		{"GET /docs", h.docs},
		{"GET /metrics", h.writeMetrics},
		{"GET /{$}", h.root},
	}
}

func (h *Handler) createTask(ctx context.Context, w http.ResponseWriter, r *request) error {
	n, err := DecodeNewTask(r.body)
	invalid, ok := err.(InvalidError)
	if err != nil && !ok {
		return err
	}
	key, violations := idempotencyKey(r.Header)
	invalid = append(invalid, violations...)
	if r.Owner != nil && n.UserID != nil && *n.UserID != *r.Owner {
		if r.verified {
			return refuse(http.StatusForbidden, "The user_id of the body is not the user of the request.")
		}
		invalid = append(invalid, Violation{Pointer: "#/user_id", Detail: "differs from the user_id of the query"})
	}
	if len(invalid) > 0 {
		return invalid
	}
	n.UserID = cmp.Or(r.Owner, n.UserID)
	t, replayed, err := h.store.Create(ctx, n, key)
	if err != nil {
		return err
	}
	if replayed {
		w.Header().Set("Idempotency-Replayed", "true")
	}
	w.Header().Set("Location", "/api/tasks/"+t.ID)
	return writeTask(w, http.StatusCreated, t, nil)
}

func (h *Handler) listTasks(ctx context.Context, w http.ResponseWriter, r *request) error {
	page, more, err := h.store.List(ctx, r.Filter)
	if err != nil {
		return err
	}
	if more {
		r.query.Set("after", page[len(page)-1].ID)
		w.Header().Set("Link", "</api/tasks?"+r.query.Encode()+`>; rel="next"`)
	}
	return writeTasks(w, page)
}

func (h *Handler) getTask(ctx context.Context, w http.ResponseWriter, r *request) error {
	t, err := h.store.Get(ctx, Target{ID: r.id, Owner: r.Owner})
	if err != nil || noneMatch(r.Header, t.Version) {
		return writeTask(w, http.StatusOK, t, err)
	}
	w.Header().Set("Etag", etag(t))
	w.Header().Set("Cache-Control", "no-cache")
	w.WriteHeader(http.StatusNotModified)
	return nil
}

// changeTask is replaceTask and patchTask, which differ in what decodes the body.
func (h *Handler) changeTask(decode func([]byte) (Patch, error)) operation {
	return func(ctx context.Context, w http.ResponseWriter, r *request) error {
		patch, err := decode(r.body)
		if err != nil {
			return err
		}
		t, err := h.store.Patch(ctx, r.target(), patch)
		return writeTask(w, http.StatusOK, t, err)
	}
}

func (h *Handler) completeTask(ctx context.Context, w http.ResponseWriter, r *request) error {
	if len(r.body) > 0 {
		return h.changeTask(DecodeCompletion)(ctx, w, r)
	}
	t, err := h.store.Flip(ctx, r.target())
	return writeTask(w, http.StatusOK, t, err)
}

func (h *Handler) deleteTask(ctx context.Context, w http.ResponseWriter, r *request) error {
	if err := h.store.Delete(ctx, r.target()); err != nil {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

func (h *Handler) health(w http.ResponseWriter, r *http.Request) error {
	w.Header().Set("Cache-Control", "no-store")
	return write(w, http.StatusOK, mediaTypeJSON, []byte(`{"status":"ok"}`+"\n"))
}

func (h *Handler) ready(w http.ResponseWriter, r *http.Request) error {
	if h.draining.Load() {
		return refuse(http.StatusServiceUnavailable, "The service is shutting down.")
	}
	ctx, cancel := context.WithTimeout(r.Context(), readyTimeout)
	defer cancel()
	if err := h.store.Ping(ctx); err != nil {
		return err
	}
	return h.health(w, r)
}

func (h *Handler) openAPI(w http.ResponseWriter, r *http.Request) error {
	return write(w, http.StatusOK, mediaTypeJSON, openAPI)
}

func (h *Handler) docs(w http.ResponseWriter, r *http.Request) error {
	w.Header().Set("Content-Security-Policy", pagePolicy(docs))
	return write(w, http.StatusOK, "text/html; charset=utf-8", docs)
}

// pagePolicy returns the Content-Security-Policy of a page: the one script and
// the one style sheet in it, no markup made from text, and requests to its own
// origin only.
func pagePolicy(page []byte) string {
	hash := func(element string) string {
		_, after, _ := bytes.Cut(page, []byte("<"+element+">"))
		text, _, _ := bytes.Cut(after, []byte("</"+element+">"))
		sum := sha256.Sum256(text)
		return "'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) + "'"
	}
	return "default-src 'none'; script-src " + hash("script") + "; style-src " + hash("style") +
		"; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'" +
		"; require-trusted-types-for 'script'; trusted-types 'none'"
}

func (h *Handler) writeMetrics(w http.ResponseWriter, r *http.Request) error {
	page := h.metrics.appendTo(nil, h.store.Stats())
	return write(w, http.StatusOK, "text/plain; version=0.0.4; charset=utf-8", page)
}

func (h *Handler) root(w http.ResponseWriter, r *http.Request) error {
	w.Header().Set("Location", "/docs")
	w.WriteHeader(http.StatusTemporaryRedirect)
	return nil
}

// request is a request on tasks that has passed all checks but those of what
// its body says.
type request struct {
	*http.Request
	Filter              // what the query says; its Owner is whose tasks any request is about
	query    url.Values // the same as it was sent
	verified bool       // Owner comes from [ContextWithUser]
	id       string
	body     []byte
}

// target is the task that a request wants to change, if it has the right version.
func (r *request) target() Target {
	return Target{ID: r.id, Owner: r.Owner, Versions: matchVersions(r.Header)}
}

// operation is what is done for a request on tasks, and how it is answered.
type operation func(ctx context.Context, w http.ResponseWriter, r *request) error

// tasks makes an operation an endpoint, by doing what comes before all of them,
// in the order in which errors take precedence. params are the query parameters
// that the operation knows; accepts are the media types of its body, none if it
// has no body.
func (h *Handler) tasks(do operation, params, accepts []string) endpoint {
	return func(w http.ResponseWriter, req *http.Request) error {
		// A tenth of the time is left for the answer when the database takes
		// all that it is given.
		ctx, cancel := context.WithTimeout(req.Context(), h.opts.RequestTimeout/10*9)
		defer cancel()
		r := &request{Request: req}
		// First of all, so that slow senders occupy no slot. A body that means
		// nothing is read too: before its end net/http does not see a client go.
		var bodyErr error
		r.body, bodyErr = h.readBody(w, req)
		if accepts == nil {
			r.body, bodyErr = nil, nil
		}
		select {
		case h.slots <- struct{}{}:
			defer func() { <-h.slots }()
		default:
			return refuse(http.StatusServiceUnavailable, "The service has too many requests in flight.")
		}
		if err := r.readQuery(params); err != nil {
			return err
		}
		if s := r.PathValue("id"); s != "" {
			var ok bool
			if r.id, ok = parseID(s); !ok {
				return refuse(http.StatusNotFound, "There is no such task: %q is not a UUID.", s)
			}
		}
		if len(r.body) > 0 || bodyErr != nil {
			if err := checkMediaType(w, req, accepts); err != nil {
				return err
			}
		}
		if bodyErr != nil {
			return bodyErr
		}
		return do(ctx, w, r)
	}
}

// readBody reads the body within the request's deadline and up to its limit.
func (h *Handler) readBody(w http.ResponseWriter, r *http.Request) ([]byte, error) {
	if r.ContentLength == 0 {
		return nil, nil
	}
	// Where deadlines are not supported, those of the server must do.
	rc := http.NewResponseController(w)
	timeout := h.opts.RequestTimeout / 10 * 8 // leaves the database some
	rc.SetReadDeadline(time.Now().Add(timeout))
	var body []byte
	var err error
	if r.ContentLength <= maxBody {
		body, err = io.ReadAll(io.LimitReader(r.Body, maxBody+1))
	}
	switch {
	case r.ContentLength > maxBody || len(body) > maxBody:
		return nil, refuse(http.StatusRequestEntityTooLarge, "The body is larger than %d bytes.", maxBody)
	case errors.Is(err, os.ErrDeadlineExceeded):
		return nil, refuse(http.StatusRequestTimeout, "The body did not arrive within %v.", timeout)
	case err != nil:
		return nil, MalformedError("The body broke off: " + err.Error() + ".")
	}
	// A deadline that passes while the request is served would end the
	// connection's context, and so each later request on it.
	rc.SetReadDeadline(time.Time{})
	w.(*response).unread = false
	return body, nil
}

// readQuery reads the query and decides whose tasks the request is about.
func (r *request) readQuery(known []string) error {
	var violations InvalidError
	r.Filter, r.query, violations = parseQuery(r.URL.RawQuery, known)
	if user, ok := r.Context().Value(userKey{}).(string); ok {
		if !utf8.ValidString(user) || userIDViolations(user) != nil {
			return refuse(http.StatusForbidden, "The user of the request cannot own tasks.")
		}
		if r.Owner != nil && *r.Owner != user {
			return refuse(http.StatusForbidden, "The user_id of the query is not the user of the request.")
		}
		r.Owner, r.verified = &user, true
	}
	if len(violations) > 0 {
		return violations
	}
	return nil
}

// parseQuery reads the query parameters of a request on tasks. None is ignored:
// if a misspelt user_id were, the request would be about everybody's tasks.
func parseQuery(query string, known []string) (f Filter, values url.Values, violations InvalidError) {
	f.Limit, values = defaultLimit, url.Values{}
	for pair := range strings.SplitSeq(query, "&") {
		if pair == "" {
			continue
		}
		name, value, _ := strings.Cut(pair, "=")
		name, nameErr := url.QueryUnescape(name)
		value, valueErr := url.QueryUnescape(value)
		detail := ""
		switch {
		case strings.Contains(pair, ";"): // which some take for a separator
			detail = "must have each semicolon encoded, as %3B"
		case nameErr != nil || valueErr != nil || !utf8.ValidString(value):
			detail = "is malformed"
		case !slices.Contains(known, name):
			detail = "is not a parameter known here"
		case values.Has(name):
			detail = "is repeated"
		default:
			values.Set(name, value)
			detail = f.set(name, value)
		}
		if detail != "" {
			violations = append(violations, Violation{Parameter: cmp.Or(name, pair), Detail: detail})
		}
	}
	return f, values, violations
}

// set sets the field of a query parameter, or says what is wrong with its value.
func (f *Filter) set(name, value string) (violation string) {
	switch name {
	case "user_id":
		f.Owner = &value
		if violations := userIDViolations(value); violations != nil {
			return violations[0]
		}
	case "completed":
		completed := value == "true"
		f.Completed = &completed
		if !completed && value != "false" {
			return "must be true or false"
		}
	case "sort":
		f.Descending = value == "-created_at"
		if !f.Descending && value != "created_at" {
			return "must be created_at or -created_at"
		}
	case "limit":
		n, err := strconv.ParseUint(value, 10, 16)
		f.Limit = int(n)
		if err != nil || n < 1 || n > maxLimit {
			return fmt.Sprintf("must be from 1 to %d", maxLimit)
		}
	case "after":
		var ok bool
		if f.After, ok = parseID(value); !ok {
			return "must be the id of a task"
		}
	}
	return ""
}

// checkMediaType checks the media type of a body. Parameters do not matter:
// JSON is always UTF-8.
func checkMediaType(w http.ResponseWriter, r *http.Request, accepts []string) error {
	mediaType, _, _ := strings.Cut(r.Header.Get("Content-Type"), ";")
	if slices.Contains(accepts, strings.ToLower(strings.TrimSpace(mediaType))) {
		return nil
	}
	name := map[string]string{http.MethodPost: "Accept-Post", http.MethodPatch: "Accept-Patch"}[r.Method]
	list := strings.Join(accepts, ", ")
	w.Header().Set(cmp.Or(name, "Accept"), list)
	return refuse(http.StatusUnsupportedMediaType, "The Content-Type must be %s.", strings.ReplaceAll(list, ", ", " or "))
}

// idempotencyKey returns the value of the header field Idempotency-Key, if
// there is one, or what is wrong with it.
func idempotencyKey(header http.Header) (string, InvalidError) {
	const name = "Idempotency-Key"
	keys := header.Values(name)
	if len(keys) == 0 {
		return "", nil
	}
	visible := !strings.ContainsFunc(keys[0], func(r rune) bool { return r < '!' || r > '~' })
	if len(keys) > 1 || keys[0] == "" || len(keys[0]) > maxKey || !visible {
		return "", InvalidError{{Header: name, Detail: fmt.Sprintf("must be one value of 1 to %d visible ASCII characters", maxKey)}}
	}
	return keys[0], nil
}

// etag returns the entity tag of a task, a strong one.
func etag(t Task) string { return `"` + strconv.FormatInt(t.Version, 10) + `"` }

// matchVersions returns the versions that a change is conditional on by the
// header field If-Match (RFC 9110 §13.1.1), nil if it is not.
func matchVersions(header http.Header) []int64 {
	fields := header.Values("If-Match")
	if fields == nil {
		return nil
	}
	tags, any := parseTags(fields)
	if any {
		return nil
	}
	versions := []int64{} // not nil: none will do
	for _, tag := range tags {
		n, err := strconv.ParseInt(strings.Trim(tag, `"`), 10, 64)
		if err == nil && etag(Task{Version: n}) == tag {
			versions = append(versions, n)
		}
	}
	return versions
}

// noneMatch evaluates the header field If-None-Match (RFC 9110 §13.1.2), whose
// comparison is the weak one. It reports true also when there is no such field.
func noneMatch(header http.Header, version int64) bool {
	tags, any := parseTags(header.Values("If-None-Match"))
	tag := etag(Task{Version: version})
	return !any && !slices.Contains(tags, tag) && !slices.Contains(tags, "W/"+tag)
}

// parseTags returns the entity tags in the list that fields make up together,
// or any for a single *. A list that is malformed anywhere has no tags.
func parseTags(fields []string) (tags []string, any bool) {
	list := strings.Join(fields, ",")
	if strings.Trim(list, " \t") == "*" {
		return nil, true
	}
	for {
		list = strings.TrimLeft(list, " \t,")
		if list == "" {
			return tags, false
		}
		opaque, ok := strings.CutPrefix(strings.TrimPrefix(list, "W/"), `"`)
		opaque, rest, closed := strings.Cut(opaque, `"`)
		if !ok || !closed || strings.ContainsFunc(opaque, func(r rune) bool { return r <= ' ' || r == 0x7f }) {
			return nil, false
		}
		tags = append(tags, strings.TrimSuffix(list, rest))
		list = strings.TrimLeft(rest, " \t")
		if list != "" && list[0] != ',' {
			return nil, false
		}
	}
}

// ServeHTTP answers a request, whatever it is, logs it and counts it.
func (h *Handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	start := time.Now()
	h.metrics.inFlight.Add(1)
	defer h.metrics.inFlight.Add(-1)
	res := &response{ResponseWriter: w, requestID: requestID(r)}
	w.Header().Set("X-Request-Id", res.requestID)
	w.Header().Set("X-Content-Type-Options", "nosniff")
	res.unread = r.ContentLength != 0
	defer func() {
		elapsed := time.Since(start)
		h.metrics.observe(res.route, r.Method, res.status, elapsed)
		h.log(r, res, elapsed)
	}()
	h.serve(res, r)
	if res.err != nil {
		writeProblem(res, res.err)
	}
}

// serve lets the route of a request answer it, or finds that it has none.
func (h *Handler) serve(w *response, r *http.Request) {
	defer func() {
		if v := recover(); v != nil {
			if w.status != 0 || v == http.ErrAbortHandler {
				// Part of an answer is out: only breaking it off tells so.
				w.status, w.err = http.StatusInternalServerError, fmt.Errorf("panic: %v\n%s", v, debug.Stack())
				panic(http.ErrAbortHandler)
			}
			w.route = cmp.Or(w.route, noRoute)
			w.err = fmt.Errorf("panic: %v\n%s", v, debug.Stack())
		}
	}()
	w.named = h.allowOrigin(w.Header(), r.Header.Get("Origin"))
	h.mux.ServeHTTP(w, r)
	if w.route == "" {
		w.err = h.unmatched(w, r)
	}
}

// unmatched answers a request whose path or method no route has, a preflight
// of CORS among them (Fetch standard, §3.3).
func (h *Handler) unmatched(w *response, r *http.Request) error {
	header := w.Header()
	header.Del("Location") // ServeMux wanted to redirect
	w.route = noRoute
	switch allow := header.Get("Allow"); {
	case allow == "":
		return refuse(http.StatusNotFound, "There is nothing at this path.")
	case w.named && r.Method == http.MethodOptions && r.Header.Get("Access-Control-Request-Method") != "":
		header.Set("Access-Control-Allow-Methods", allow)
		header.Set("Access-Control-Allow-Headers", "Content-Type, If-Match, If-None-Match, Idempotency-Key, X-Request-ID")
		header.Set("Access-Control-Max-Age", corsMaxAge)
		header.Del("Allow")
		header.Del("Content-Type")
		w.WriteHeader(http.StatusNoContent)
		return nil
	}
	return refuse(http.StatusMethodNotAllowed, "The method %s is not allowed here.", r.Method)
}

// allowOrigin sets what CORS wants on every response, and reports whether
// origin is among those that may send requests.
func (h *Handler) allowOrigin(header http.Header, origin string) bool {
	if len(h.opts.CORSOrigins) == 0 {
		return false
	}
	header.Add("Vary", "Origin")
	if origin == "" || !slices.Contains(h.opts.CORSOrigins, origin) && !slices.Contains(h.opts.CORSOrigins, "*") {
		return false
	}
	header.Set("Access-Control-Allow-Origin", origin)
	header.Set("Access-Control-Expose-Headers", "ETag, Link, Location, Retry-After, X-Request-ID, Idempotency-Replayed")
	return true
}

// requestID returns the request's own id if it is a good one, else a new one.
func requestID(r *http.Request) string {
	id := r.Header.Get("X-Request-Id")
	bad := strings.ContainsFunc(id, func(c rune) bool {
		return (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && !strings.ContainsRune("._-", c)
	})
	if id == "" || len(id) > maxRequestID || bad {
		return rand.Text()
	}
	return id
}

// log writes the line of a request, with the cause of what is not the client's fault.
func (h *Handler) log(r *http.Request, w *response, elapsed time.Duration) {
	level := slog.LevelInfo
	if r.Method == http.MethodHead {
		w.bytes = 0 // net/http sends none
	}
	attrs := []slog.Attr{
		slog.String("method", r.Method),
		slog.String("route", w.route),
		slog.Int("status", w.status),
		slog.Duration("duration", elapsed),
		slog.Int("bytes", w.bytes),
		slog.String("request_id", w.requestID),
	}
	if w.status >= 500 {
		attrs = append(attrs, slog.String("error", w.err.Error()))
		// That the service is busy or stopping, or the client gone, is no fault.
		if _, refused := errors.AsType[*problem](w.err); refused || r.Context().Err() != nil {
			level = slog.LevelWarn
		} else {
			level = slog.LevelError
		}
	}
	h.opts.Logger.LogAttrs(r.Context(), level, "request", attrs...)
}

// response is a ResponseWriter that knows what has become of its request. Until
// the request has a route it writes nothing: what [http.ServeMux] says, in plain
// text, of a path or a method that it does not know is said by a problem instead.
type response struct {
	http.ResponseWriter
	requestID string
	unread    bool   // the request has a body that has not been read to its end
	named     bool   // the origin of the request may send any
	route     string // the path of its pattern; "": none yet
	status    int    // 0: nothing has been written
	bytes     int
	err       error // what the endpoint returned
}

func (w *response) WriteHeader(status int) {
	if w.route != "" {
		if w.unread {
			// net/http would wait for the rest without a limit of ours.
			w.Header().Set("Connection", "close")
			// And it would reset a connection that the client, too, wants closed,
			// before the client has read the answer; but not after this.
			io.Copy(io.Discard, http.MaxBytesReader(w.ResponseWriter, io.NopCloser(strings.NewReader("too much")), 0))
		}
		w.status = status
		w.ResponseWriter.WriteHeader(status)
	}
}

func (w *response) Write(b []byte) (int, error) {
	if w.route == "" {
		return len(b), nil
	}
	n, err := w.ResponseWriter.Write(b)
	w.bytes += n
	return n, err
}

// Unwrap is for [http.ResponseController].
func (w *response) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// problem is an error as clients see it: a problem document (RFC 9457).
type problem struct {
	Type      string       `json:"type"`
	Title     string       `json:"title"`
	Status    int          `json:"status"`
	Detail    string       `json:"detail"`
	RequestID string       `json:"request_id"`
	Errors    InvalidError `json:"errors,omitempty"`
}

func (p *problem) Error() string { return p.Detail }

// refuse returns an error that becomes the given answer.
func refuse(status int, format string, args ...any) *problem {
	return &problem{Type: "about:blank", Title: http.StatusText(status), Status: status, Detail: fmt.Sprintf(format, args...)}
}

// problemOf returns the answer to an error. What is no answer of ours is a
// defect, of which the client learns nothing.
func problemOf(err error) *problem {
	if p, ok := errors.AsType[*problem](err); ok {
		return p
	}
	if malformed, ok := errors.AsType[MalformedError](err); ok {
		return refuse(http.StatusBadRequest, "%s", malformed)
	}
	if invalid, ok := errors.AsType[InvalidError](err); ok {
		p := refuse(http.StatusUnprocessableEntity, "The request breaks rules; errors lists them.")
		p.Errors = invalid
		return p
	}
	switch {
	case errors.Is(err, ErrNotFound):
		return refuse(http.StatusNotFound, "There is no such task.")
	case errors.Is(err, ErrVersion):
		return refuse(http.StatusPreconditionFailed, "The task has another version than If-Match asks for.")
	case errors.Is(err, ErrKeyReused):
		p := refuse(http.StatusUnprocessableEntity, "The Idempotency-Key was used before with other content.")
		p.Errors = InvalidError{{Header: "Idempotency-Key", Detail: "was used before with other content"}}
		return p
	case errors.Is(err, ErrUnavailable):
		return refuse(http.StatusServiceUnavailable, "The database did not answer; a change that was asked for may have been made, or may still be, once.")
	}
	return refuse(http.StatusInternalServerError, "The service failed; the cause is in its log under this request_id.")
}

// writeProblem writes an error as a problem document.
func writeProblem(w *response, err error) {
	p := problemOf(err)
	p.RequestID = w.requestID
	if p.Status == http.StatusServiceUnavailable {
		w.Header().Set("Retry-After", retryAfter)
	}
	w.Header().Set("Cache-Control", "no-store")
	var body bytes.Buffer
	enc := json.NewEncoder(&body)
	enc.SetEscapeHTML(false)
	enc.Encode(p) // cannot fail: strings and a number
	write(w, p.Status, "application/problem+json", body.Bytes())
}

// writeTask writes the task that an operation returned, or returns its error.
func writeTask(w http.ResponseWriter, status int, t Task, err error) error {
	if err != nil {
		return err
	}
	w.Header().Set("Etag", etag(t))
	w.Header().Set("Cache-Control", "no-cache")
	return write(w, status, mediaTypeJSON, append(t.appendJSON(make([]byte, 0, 512)), '\n'))
}

// writeTasks writes a page of tasks.
func writeTasks(w http.ResponseWriter, page []Task) error {
	w.Header().Set("Cache-Control", "no-cache")
	body := appendTasks(make([]byte, 0, 2+320*len(page)), page)
	return write(w, http.StatusOK, mediaTypeJSON, append(body, '\n'))
}

// write writes a response with a body. That the client is not there any more to
// read it is no error.
func write(w http.ResponseWriter, status int, mediaType string, body []byte) error {
	w.Header().Set("Content-Type", mediaType)
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(status)
	w.Write(body)
	return nil
}

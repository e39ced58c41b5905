package main

// response.go is what goes out: the adapter that makes a response of what an
// endpoint returns, problem documents (RFC 9457), and the responses of the API.

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"
)

const statusClientClosed = 499 // nginx's

// ServeHTTP answers a request by the endpoint of the route. It is the adapter
// between endpoints and net/http: it alone writes, logs and counts.
func (rt *route) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	start := time.Now()
	rt.h.metrics.inFlight.Add(1)
	defer rt.h.metrics.inFlight.Add(-1)
	id := rand.Text()
	if ids := r.Header.Values("X-Request-Id"); len(ids) == 1 && isVisible(ids[0], maxRequestID) {
		id = ids[0]
	}
	res, err := rt.respond(w, r)
	if err != nil {
		p := problemOf(err)
		if p.Status == http.StatusServiceUnavailable && errors.Is(r.Context().Err(), context.Canceled) {
			p = refuse(statusClientClosed, "The client closed the connection.")
		}
		res = p.response(id)
	}
	w.Header().Set("X-Request-Id", id)
	w.Header().Set("X-Content-Type-Options", "nosniff")
	rt.h.setCORS(w.Header(), r)
	if r.ContentLength != 0 && r.Body != http.NoBody {
		closeUnread(w)
	}
	maps.Copy(w.Header(), res.header)
	if res.body != nil {
		w.Header().Set("Content-Length", strconv.Itoa(len(res.body)))
	}
	w.WriteHeader(res.status)
	_, _ = w.Write(res.body) // it is no error if the client does not read it
	size := len(res.body)
	if r.Method == http.MethodHead {
		size = 0 // net/http sends none
	}
	path := rt.pattern[strings.Index(rt.pattern, " ")+1:]
	elapsed := time.Since(start)
	rt.h.metrics.observe(path, r.Method, res.status, elapsed)
	rt.h.log(r, path, res.status, elapsed, size, id, err)
}

// respond calls the endpoint after the checks that all routes share.
func (rt *route) respond(w http.ResponseWriter, r *http.Request) (res *response, err error) {
	defer recoverTo(&err)
	if !rt.h.hostServed(r.Host) {
		return nil, refuse(http.StatusMisdirectedRequest, "The Host %q is not served here; ALLOWED_HOSTS names those that are.", r.Host)
	}
	if rt.pattern != noRoute && !rt.h.originNamed(r) && new(http.CrossOriginProtection).Check(r) != nil {
		return nil, refuse(http.StatusForbidden, "The origin %q may not send this request: CORS_ORIGINS does not name it, and it differs from the Host, %q.",
			r.Header.Get("Origin"), r.Host)
	}
	return rt.serve(w, r)
}

// closeUnread makes net/http close the connection after the response, without a
// reset, which could cost the client the response (golang.org/issue/3595). Before
// it closes, net/http reads some of the rest of the body, here for three seconds
// instead of the server's ReadTimeout. After a MaxBytesReader has exceeded its
// limit, it also waits a moment.
func closeUnread(w http.ResponseWriter) {
	w.Header().Set("Connection", "close")
	_ = http.NewResponseController(w).SetReadDeadline(time.Now().Add(3 * time.Second))
	_, _ = io.Copy(io.Discard, http.MaxBytesReader(w, io.NopCloser(strings.NewReader("too much")), 0))
}

// setCORS sets what CORS needs on every response.
func (h *Handler) setCORS(header http.Header, r *http.Request) {
	if len(h.opts.CORSOrigins) > 0 {
		header.Add("Vary", "Origin")
	}
	origin := r.Header.Get("Origin")
	if h.originNamed(r) {
		header.Set("Access-Control-Allow-Origin", origin)
		header.Set("Access-Control-Expose-Headers", "ETag, Link, Location, Retry-After, WWW-Authenticate, X-Request-ID, Idempotency-Replayed")
	}
	if origin != "*" && slices.Contains(h.opts.CORSOrigins, origin) {
		header.Set("Access-Control-Allow-Credentials", "true")
	}
}

// log writes the line of a request, with the cause of a 5xx.
func (h *Handler) log(r *http.Request, path string, status int, elapsed time.Duration, size int, id string, err error) {
	level, cause := slog.LevelInfo, slog.Attr{} // an empty Attr is omitted
	if status >= 500 {
		level, cause = slog.LevelError, slog.String("error", err.Error())
		if _, refused := errors.AsType[*problem](err); refused { // busy, stopping, or unable to verify the user
			level = slog.LevelWarn
		}
	}
	h.opts.Logger.LogAttrs(r.Context(), level, "request",
		slog.String("method", r.Method),
		slog.String("route", path),
		slog.Int("status", status),
		slog.Float64("duration_ms", float64(elapsed.Microseconds())/1000),
		slog.Int("bytes", size),
		slog.String("request_id", id),
		cause)
}

// problem is an error as clients see it: a problem document (RFC 9457).
type problem struct {
	Type      string       `json:"type"`
	Title     string       `json:"title"`
	Status    int          `json:"status"`
	Detail    string       `json:"detail"`
	RequestID string       `json:"request_id"`
	Errors    InvalidError `json:"errors,omitempty"`
	header    http.Header  // besides what all problems have
	cause     error        // for the log
}

func (p *problem) Error() string {
	if p.cause != nil {
		return p.cause.Error()
	}
	return p.Detail
}

// refuse returns an error that becomes the given response.
func refuse(status int, format string, args ...any) *problem {
	title := cmp.Or(http.StatusText(status), "Client Closed Request")
	return &problem{Type: "about:blank", Title: title, Status: status, Detail: fmt.Sprintf(format, args...)}
}

// with sets the header field that the response has besides those of all problems.
func (p *problem) with(name, value string) *problem {
	p.header = http.Header{http.CanonicalHeaderKey(name): {value}}
	return p
}

// problemOf makes a problem of an error. An error that it does not know is a
// defect; its text stays in the log.
func problemOf(err error) *problem {
	if p, ok := errors.AsType[*problem](err); ok {
		return p
	}
	if malformed, ok := errors.AsType[malformedError](err); ok {
		return refuse(http.StatusBadRequest, "%s", malformed)
	}
	invalid, _ := errors.AsType[InvalidError](err)
	switch {
	case errors.Is(err, ErrNotFound):
		return refuse(http.StatusNotFound, "Not found.")
	case errors.Is(err, ErrPrecondition):
		return refuse(http.StatusPreconditionFailed, "The resource has another version than the request requires.")
	case errors.Is(err, ErrUnavailable):
		return refuse(http.StatusServiceUnavailable, "The database did not respond; a change may have been made once, or may still be.")
	case errors.Is(err, ErrKeyReused):
		invalid = InvalidError{{Header: "Idempotency-Key", Detail: "was used with other content"}}
	case errors.Is(err, ErrUnknownUser):
		invalid = InvalidError{{Pointer: "#/user_id", Detail: "unknown user"}}
	case invalid == nil:
		return refuse(http.StatusInternalServerError, "Internal error; the log has the cause under this request_id.")
	}
	p := refuse(http.StatusUnprocessableEntity, "The request is invalid; see errors.")
	p.Errors = invalid
	return p
}

// response returns the problem as a response.
func (p *problem) response(requestID string) *response {
	p.RequestID = requestID
	var body bytes.Buffer
	enc := json.NewEncoder(&body)
	enc.SetEscapeHTML(false)
	_ = enc.Encode(p) // cannot fail: strings and a number
	res := newResponse("application/problem+json", "no-store", body.Bytes())
	res.status = p.Status
	maps.Copy(res.header, p.header)
	if p.Status == http.StatusServiceUnavailable {
		res.header.Set("Retry-After", "1") // second
	}
	return res
}

// response is an answer that is complete before its first byte is written.
type response struct {
	status int
	header http.Header // besides what all responses have
	body   []byte      // nil: none
}

// newResponse returns a 200.
func newResponse(mediaType, cacheControl string, body []byte) *response {
	return &response{http.StatusOK, http.Header{"Content-Type": {mediaType}, "Cache-Control": {cacheControl}}, body}
}

// created returns the response to a creation, and err. If err is not nil, row is a
// zero value and the response is ignored; the same holds below.
func created[T resource](r *request, row T, replayed bool, err error) (*response, error) {
	res, err := changed(row, err)
	id, _, _ := row.identity()
	res.status = http.StatusCreated
	res.header.Set("Location", r.path+"/"+id)
	if replayed {
		res.header.Set("Idempotency-Replayed", "true")
	}
	return res, err
}

// listed returns the response with a page, which has a link to the next one if
// more rows follow, and err.
func listed[T resource](r *request, rows []T, more bool, err error) (*response, error) {
	body := append(make([]byte, 0, 2+320*len(rows)), '[')
	for _, row := range rows {
		body = append(row.appendJSON(body), ',')
	}
	res := newResponse(mediaTypeJSON, "no-cache", append(bytes.TrimSuffix(body, []byte(",")), "]\n"...))
	if more {
		last, _, _ := rows[len(rows)-1].identity()
		r.query.Set("after", last)
		res.header.Set("Link", "<"+r.path+"?"+r.query.Encode()+`>; rel="next"`)
	}
	return res, err
}

// fetched returns the response to a GET with its conditions, and err.
func fetched[T resource](r *request, row T, err error) (*response, error) {
	res, err := changed(row, err)
	_, _, version := row.identity()
	if r.target.excludes(version) {
		res.status, res.body = http.StatusNotModified, nil
		res.header.Del("Content-Type")
	}
	return res, err
}

// changed returns the response with a row, and err.
func changed[T resource](row T, err error) (*response, error) {
	_, _, version := row.identity()
	res := newResponse(mediaTypeJSON, "no-cache", append(row.appendJSON(make([]byte, 0, 512)), '\n'))
	res.header["Etag"] = []string{etag(version)}
	return res, err
}

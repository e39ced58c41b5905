package main

// request.go is what comes in: the checks before an operation, and what they read
// from a request.

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

// Limits of requests.
const (
	maxBody      = 128 << 10 // bytes; the largest legal task fits, however it is escaped
	maxKey       = 255       // bytes of an Idempotency-Key
	maxRequestID = 128       // bytes
	maxLimit     = 1000      // rows on a page
	defaultLimit = 100

	mediaTypeJSON  = "application/json"
	mediaTypePatch = "application/merge-patch+json"
)

// request is an API request. Its fields are set as it passes the checks.
type request struct {
	*http.Request            // its context has the request's deadline
	path          string     // as clients see it, without trailing slash
	Filter                   // what the query says; the request is about rows of Owner only
	query         url.Values // the valid parameters, for the link to the next page
	verified      bool       // Owner comes from [Options.Authenticate]
	target        Target     // the row in the path, with the conditions of the headers
	body          []byte
}

// operation is what the API does for a request.
type operation func(r *request) (*response, error)

// api makes an operation an endpoint. params are its query parameters, accepts
// the media types of its body; nil means that a body is read and ignored.
func (h *Handler) api(do operation, params, accepts []string) endpoint {
	return func(w http.ResponseWriter, r *http.Request) (*response, error) {
		start := time.Now()
		// The last tenth of the time is for the response, in case the database
		// uses all the rest.
		ctx, cancel := context.WithTimeout(r.Context(), h.opts.RequestTimeout/10*9)
		defer cancel()
		req := &request{Request: r.WithContext(ctx), path: h.opts.Prefix + strings.TrimSuffix(r.URL.EscapedPath(), "/")}
		user, err := h.authenticate(req.Request)
		if err != nil {
			return nil, err
		}
		r.Body = req.Body // which Authenticate may have replaced
		// Read the body first, so that a slow sender holds no slot. Read it even if
		// the operation has none: only after its end does net/http notice that a
		// client has gone.
		var bodyErr error
		req.body, bodyErr = h.readBody(w, r, start)
		select {
		case h.slots <- struct{}{}:
			defer func() { <-h.slots }()
		default:
			return nil, refuse(http.StatusServiceUnavailable, "The service has too many requests in flight.")
		}
		err = cmp.Or(req.readQuery(params, user), req.readTarget()) // in this order: the target has the owner of the query
		if err == nil && (len(req.body) > 0 || bodyErr != nil) {
			err = cmp.Or(checkMediaType(r, accepts), bodyErr)
		}
		if err != nil {
			return nil, err
		}
		res, err := do(req)
		if match := req.target.Match; match != nil && len(match) == 0 && errors.Is(err, ErrPrecondition) {
			err = refuse(http.StatusPreconditionFailed, `If-Match has no tag that can match; send "<version>", with the version that you have read.`)
		}
		return res, err
	}
}

// hostServed reports whether a request with this Host is served. Names compare
// without port, case and final dot. No browser sends a request without Host.
func (h *Handler) hostServed(host string) bool {
	if host == "" || len(h.opts.Hosts) == 0 || slices.Contains(h.opts.Hosts, "*") {
		return true
	}
	host = canonicalHost((&url.URL{Host: host}).Hostname())
	_, err := netip.ParseAddr(host)
	return err == nil || host == "localhost" || strings.HasSuffix(host, ".localhost") ||
		slices.ContainsFunc(h.opts.Hosts, func(served string) bool { return canonicalHost(served) == host })
}

func canonicalHost(name string) string { return strings.TrimSuffix(strings.ToLower(name), ".") }

// originNamed reports whether the origin of a request is among the CORSOrigins.
func (h *Handler) originNamed(r *http.Request) bool {
	origin := r.Header.Get("Origin")
	return origin != "" && (slices.Contains(h.opts.CORSOrigins, origin) || slices.Contains(h.opts.CORSOrigins, "*"))
}

// authenticate returns the user who sent a request, nil if nothing authenticates.
func (h *Handler) authenticate(r *http.Request) (*string, error) {
	if h.opts.Authenticate == nil {
		return nil, nil
	}
	user, err := h.opts.Authenticate(r)
	switch {
	case err != nil && (errors.Is(err, ErrUnavailable) || r.Context().Err() != nil):
		p := refuse(http.StatusServiceUnavailable, "The user could not be verified; try again later.")
		p.cause = fmt.Errorf("authenticate: %w", err)
		return nil, p
	case err != nil:
		return nil, refuse(http.StatusUnauthorized, "The request is not authenticated.").with("WWW-Authenticate", "Bearer")
	case !utf8.ValidString(user) || userIDViolations(user) != nil:
		return nil, refuse(http.StatusForbidden, "The user of the request cannot own tasks.")
	}
	return &user, nil
}

// readBody reads the body, up to its limit and within 80 % of the request's time.
// If it has read the body to its end, it sets r.Body to NoBody; otherwise ServeHTTP
// closes the connection.
func (h *Handler) readBody(w http.ResponseWriter, r *http.Request, start time.Time) ([]byte, error) {
	if r.ContentLength == 0 {
		return nil, nil
	}
	// Where deadlines are not supported, those of the server apply.
	timeout := h.opts.RequestTimeout / 10 * 8 // leaves time for the database
	_ = http.NewResponseController(w).SetReadDeadline(start.Add(timeout))
	var body []byte
	var err error = &http.MaxBytesError{Limit: maxBody}
	if r.ContentLength <= maxBody {
		body, err = io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	}
	large, tooLarge := errors.AsType[*http.MaxBytesError](err) // or of an outer handler
	switch {
	case tooLarge:
		return nil, refuse(http.StatusRequestEntityTooLarge, "The body is larger than %d bytes.", large.Limit)
	case errors.Is(err, os.ErrDeadlineExceeded):
		return nil, refuse(http.StatusRequestTimeout, "The body did not arrive within %v.", timeout)
	case err != nil && r.Context().Err() != nil:
		return nil, refuse(statusClientClosed, "The body ended unexpectedly.")
	case err != nil || int64(len(body)) < r.ContentLength: // or something has read it already
		return nil, malformedError("The body could not be read.")
	}
	r.Body = http.NoBody
	return body, nil
}

// readQuery reads the query and sets the owner of the rows. An unknown parameter is
// an error: if a mistyped user_id were ignored, the request would be about
// everyone's rows.
func (r *request) readQuery(params []string, user *string) error {
	var violations InvalidError
	r.Limit, r.query = defaultLimit, url.Values{}
	for pair := range strings.FieldsFuncSeq(r.URL.RawQuery, func(c rune) bool { return c == '&' }) {
		name, value, _ := strings.Cut(pair, "=")
		name, nameErr := url.QueryUnescape(name)
		value, valueErr := url.QueryUnescape(value)
		var details []string
		switch {
		case strings.Contains(pair, ";"): // some servers separate parameters by it
			details = []string{"a semicolon must be encoded as %3B"}
		case nameErr != nil || valueErr != nil || !utf8.ValidString(value):
			details = []string{"malformed"}
		case !slices.Contains(params, name):
			details = []string{"unknown parameter"}
		case r.query.Has(name):
			details = []string{"repeated"}
		default:
			r.query.Set(name, value)
			details = r.set(name, value)
		}
		for _, detail := range details {
			violations = append(violations, Violation{Parameter: cmp.Or(name, pair), Detail: detail}) // a malformed name is ""
		}
	}
	if user != nil && r.Owner != nil && *r.Owner != *user {
		return refuse(http.StatusForbidden, "The user_id of the query is not the user of the request.")
	}
	r.Owner, r.verified = cmp.Or(user, r.Owner), user != nil
	if violations != nil {
		return violations
	}
	return nil
}

// set sets the field of a query parameter, and returns what is wrong with its value.
func (f *Filter) set(name, value string) (violations []string) {
	ok, rule := true, ""
	switch name {
	case "user_id":
		f.Owner = &value
		return userIDViolations(value)
	case "completed":
		f.Completed = new(value == "true")
		ok, rule = value == "true" || value == "false", "must be true or false"
	case "sort":
		f.Descending = value == "-created_at"
		ok, rule = f.Descending || value == "created_at", "must be created_at or -created_at"
	case "limit":
		n, err := strconv.ParseUint(value, 10, 16)
		f.Limit = int(n)
		ok, rule = err == nil && 1 <= n && n <= maxLimit, fmt.Sprintf("must be from 1 to %d", maxLimit)
	case "after":
		f.After, ok = parseID(value)
		rule = "must be an id"
	}
	if ok {
		return nil
	}
	return []string{rule}
}

// readTarget reads the id of a path such as /api/tasks/{id}/complete, and the
// conditions for that row (RFC 9110 §13.1.1 and §13.1.2). It does not use
// [http.Request.PathValue], which may be an outer router's.
func (r *request) readTarget() error {
	segments := strings.Split(r.URL.EscapedPath()+"/", "/")
	if len(segments) < 5 || segments[3] == "" {
		return nil
	}
	segment, _ := url.PathUnescape(segments[3]) // cannot fail
	id, ok := parseID(segment)
	if !ok {
		return refuse(http.StatusNotFound, "Not found: %q is not a UUID.", segment)
	}
	r.target = Target{ID: id, Owner: r.Owner}
	if fields := r.Header.Values("If-Match"); fields != nil {
		if tags, star := parseTags(fields); !star {
			r.target.Match = append([]int64{}, versions(tags)...) // not nil
		}
	}
	tags, star := parseTags(r.Header.Values("If-None-Match"))
	for i := range tags {
		tags[i] = strings.TrimPrefix(tags[i], "W/") // the comparison is weak
	}
	r.target.NoneMatch, r.target.NoneMatchAny = versions(tags), star
	return nil
}

// checkMediaType checks the type of a body and that it is not compressed.
// Parameters of the type do not matter: JSON is always UTF-8.
func checkMediaType(r *http.Request, accepts []string) error {
	if encoding := strings.Join(r.Header.Values("Content-Encoding"), ", "); encoding != "" && !strings.EqualFold(encoding, "identity") {
		return refuse(http.StatusUnsupportedMediaType, "The body must not be compressed; its Content-Encoding is %q.", encoding).with("Accept-Encoding", "identity")
	}
	mediaType, _, _ := strings.Cut(r.Header.Get("Content-Type"), ";")
	if accepts == nil || slices.Contains(accepts, strings.ToLower(strings.TrimSpace(mediaType))) {
		return nil
	}
	name := map[string]string{http.MethodPost: "Accept-Post", http.MethodPatch: "Accept-Patch", http.MethodPut: "Accept"}[r.Method]
	return refuse(http.StatusUnsupportedMediaType, "The Content-Type must be %s.", strings.Join(accepts, " or ")).with(name, strings.Join(accepts, ", "))
}

// checkDraft makes the checks that all creations share, and returns the
// Idempotency-Key. err is the error of decoding the body; its violations are
// reported together with those found here. *owner is the owner in the body;
// checkDraft sets it to the owner of the request, if there is one.
func (r *request) checkDraft(owner **string, err error) (key string, _ error) {
	invalid, ok := err.(InvalidError)
	if err != nil && !ok {
		return "", err
	}
	if r.Owner != nil && *owner != nil && **owner != *r.Owner {
		if r.verified {
			return "", refuse(http.StatusForbidden, "The user_id of the body is not the user of the request.")
		}
		invalid = append(invalid, Violation{Pointer: "#/user_id", Detail: "differs from the user_id of the query"})
	}
	*owner = cmp.Or(r.Owner, *owner)
	if keys := r.Header.Values("Idempotency-Key"); len(keys) == 1 && isVisible(keys[0], maxKey) {
		key = keys[0]
	} else if keys != nil {
		invalid = append(invalid, Violation{Header: "Idempotency-Key", Detail: fmt.Sprintf("must be one value of 1 to %d visible ASCII characters", maxKey)})
	}
	if len(invalid) > 0 {
		return "", invalid
	}
	return key, nil
}

// isVisible reports whether s is 1 to most visible ASCII characters.
func isVisible(s string, most int) bool {
	return s != "" && len(s) <= most && !strings.ContainsFunc(s, func(r rune) bool { return r < '!' || r > '~' })
}

// versions returns the versions whose entity tags are among tags.
func versions(tags []string) (all []int64) {
	for _, tag := range tags {
		if n, err := strconv.ParseInt(strings.Trim(tag, `"`), 10, 64); err == nil && n > 0 && etag(n) == tag {
			all = append(all, n)
		}
	}
	return all
}

// etag returns the entity tag of a version, a strong one.
func etag(version int64) string { return `"` + strconv.FormatInt(version, 10) + `"` }

// Entity tags (RFC 9110 §8.8.3), and lists of them (§5.6.1).
const tagPattern = `(?:W/)?"[^\x00-\x20"\x7f]*"`

var (
	tagForm = regexp.MustCompile(tagPattern)
	tagList = regexp.MustCompile(`^[ \t,]*(?:` + tagPattern + `[ \t]*(?:,[ \t,]*|$))*$`)
)

// parseTags returns the entity tags of a list that may be spread over several
// fields, or star for a single *. A malformed list has no tags.
func parseTags(fields []string) (tags []string, star bool) {
	list := strings.Join(fields, ",")
	if tagList.MatchString(list) {
		tags = tagForm.FindAllString(list, -1)
	}
	return tags, strings.Trim(list, " \t") == "*"
}

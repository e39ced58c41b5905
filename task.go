package main

// task.go is the domain: what a task is, what a client may send of it, the
// rules for both, and the errors that operations on tasks have. It knows
// neither HTTP nor SQL.

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf16"
	"unicode/utf8"
)

// Limits of a task's texts, in Unicode code points. The constraints of
// schema.sql repeat them.
const (
	maxUserID      = 255
	maxTitle       = 200
	maxDescription = 10_000
)

// Errors of the operations on tasks, besides [MalformedError] and [InvalidError].
var (
	ErrNotFound    = errors.New("no such task")
	ErrVersion     = errors.New("the task has another version")
	ErrKeyReused   = errors.New("the idempotency key was used with other content")
	ErrUnavailable = errors.New("the database is unavailable")
)

// Task is a task as it is stored and as clients see it.
type Task struct {
	ID          string    `json:"id"`
	UserID      *string   `json:"user_id"`
	Title       string    `json:"title"`
	Description *string   `json:"description"`
	Completed   bool      `json:"completed"`
	Version     int64     `json:"version"`
	CreatedAt   time.Time `json:"created_at"`
	UpdatedAt   time.Time `json:"updated_at"`
}

// appendJSON appends the task as JSON, equal to what encoding/json would make of
// it, but without reflection, which took a quarter of the time of a list.
func (t Task) appendJSON(b []byte) []byte {
	b = append(b, `{"id":"`...)
	b = append(b, t.ID...)
	b = append(b, `","user_id":`...)
	b = appendString(b, t.UserID)
	b = append(b, `,"title":`...)
	b = appendString(b, &t.Title)
	b = append(b, `,"description":`...)
	b = appendString(b, t.Description)
	b = append(b, `,"completed":`...)
	b = strconv.AppendBool(b, t.Completed)
	b = append(b, `,"version":`...)
	b = strconv.AppendInt(b, t.Version, 10)
	b = append(b, `,"created_at":"`...)
	b = t.CreatedAt.AppendFormat(b, time.RFC3339Nano)
	b = append(b, `","updated_at":"`...)
	b = t.UpdatedAt.AppendFormat(b, time.RFC3339Nano)
	return append(b, `"}`...)
}

// appendTasks appends a JSON array of tasks.
func appendTasks(b []byte, tasks []Task) []byte {
	b = append(b, '[')
	for i, t := range tasks {
		if i > 0 {
			b = append(b, ',')
		}
		b = t.appendJSON(b)
	}
	return append(b, ']')
}

// appendString appends a string, which must be valid UTF-8, or null.
func appendString(b []byte, s *string) []byte {
	if s == nil {
		return append(b, "null"...)
	}
	b = append(b, '"')
	rest := *s
	for i := 0; i < len(rest); i++ {
		if c := rest[i]; c < ' ' || c == '"' || c == '\\' {
			b = append(b, rest[:i]...)
			b = fmt.Appendf(b, `\u%04x`, c)
			rest, i = rest[i+1:], -1
		}
	}
	b = append(b, rest...)
	return append(b, '"')
}

// Target names the one task that an operation is for, and on what conditions.
type Target struct {
	ID       string
	Owner    *string // the task must belong to this user; nil: to anybody
	Versions []int64 // the task must have one of these versions; nil: any
}

// Filter selects a page of tasks. The zero Filter selects none; see [maxLimit].
type Filter struct {
	Owner      *string // nil: tasks of everybody
	Completed  *bool   // nil: both
	Descending bool    // newest first
	After      string  // the id of the task that the page starts after; "": from the start
	Limit      int
}

// NewTask is what a client may say of a task at its creation.
type NewTask struct {
	UserID      *string
	Title       string
	Description *string
	Completed   bool
}

// Replacement is what PUT says of a task: all of it.
type Replacement struct {
	Title       string
	Description *string
	Completed   bool
}

// Patch is what a JSON Merge Patch says of a task. The zero Patch changes nothing.
type Patch struct {
	Title       *string
	Description Optional[string]
	Completed   *bool
}

// Optional is a member of an object in its three states: absent, null, and a value.
type Optional[T any] struct {
	Set   bool
	Value *T // nil for null and for absent
}

// InvalidError is the error of input which is well-formed but breaks rules: all
// of those that it breaks.
type InvalidError []Violation

// Violation is a rule broken at one place of a request. Exactly one of Pointer,
// Parameter and Header says where.
type Violation struct {
	Detail    string `json:"detail"`
	Pointer   string `json:"pointer,omitempty"`   // JSON Pointer into the body, as a URI fragment (RFC 6901 §6)
	Parameter string `json:"parameter,omitempty"` // name of a query parameter
	Header    string `json:"header,omitempty"`    // name of a header field
}

func (e InvalidError) Error() string {
	var b strings.Builder
	for i, v := range e {
		if i > 0 {
			b.WriteString("; ")
		}
		b.WriteString(v.Pointer + v.Parameter + v.Header + ": " + v.Detail)
	}
	return b.String()
}

// MalformedError is the error of a body that is not one well-formed JSON text.
// Its value says, to the client, what is wrong.
type MalformedError string

func (e MalformedError) Error() string { return string(e) }

// DecodeNewTask decodes the body of a POST. Its error, like those of the other
// Decode functions, is a [MalformedError] or an [InvalidError].
func DecodeNewTask(body []byte) (NewTask, error) {
	d, err := newDecoder(body)
	if err != nil {
		return NewTask{}, err
	}
	t := NewTask{
		UserID:      d.text("user_id", nullable, userIDViolations).Value,
		Title:       deref(d.text("title", required, titleViolations).Value),
		Description: d.text("description", nullable, descriptionViolations).Value,
		Completed:   deref(d.boolean("completed", optional).Value),
	}
	return t, d.end("id", "version", "created_at", "updated_at")
}

// DecodeReplacement decodes the body of a PUT.
func DecodeReplacement(body []byte) (Replacement, error) {
	d, err := newDecoder(body)
	if err != nil {
		return Replacement{}, err
	}
	r := Replacement{
		Title:       deref(d.text("title", required, titleViolations).Value),
		Description: d.text("description", nullable, descriptionViolations).Value,
		Completed:   deref(d.boolean("completed", optional).Value),
	}
	return r, d.end("id", "user_id", "version", "created_at", "updated_at")
}

// DecodePatch decodes the body of a PATCH, a JSON Merge Patch (RFC 7396).
func DecodePatch(body []byte) (Patch, error) {
	d, err := newDecoder(body)
	if err != nil {
		return Patch{}, err
	}
	p := Patch{
		Title:       d.text("title", optional, titleViolations).Value,
		Description: d.text("description", nullable, descriptionViolations),
		Completed:   d.boolean("completed", optional).Value,
	}
	return p, d.end("id", "user_id", "version", "created_at", "updated_at")
}

// DecodeCompletion decodes the body of a PATCH of the completion: whether the
// task is to be completed.
func DecodeCompletion(body []byte) (bool, error) {
	d, err := newDecoder(body)
	if err != nil {
		return false, err
	}
	completed := deref(d.boolean("completed", required).Value)
	return completed, d.end("id", "user_id", "version", "created_at", "updated_at")
}

func deref[T any](p *T) (v T) {
	if p != nil {
		v = *p
	}
	return v
}

// presence says whether a member must be there, and whether it may be null.
type presence int

const (
	required presence = iota
	optional          // may be absent, may not be null
	nullable          // may be absent or null
)

// decoder takes the members of a JSON object one by one and collects every rule
// that they break. It is stricter than encoding/json, which would accept names
// in another case and keep the last of two members with the same name.
type decoder struct {
	members    map[string][]byte // those not yet taken; the values are JSON texts
	violations InvalidError
}

// newDecoder returns a decoder of the object that body holds.
func newDecoder(body []byte) (*decoder, error) {
	if len(body) == 0 {
		return nil, MalformedError("A body is required.")
	}
	if !utf8.Valid(body) {
		return nil, MalformedError("The body is not valid UTF-8.")
	}
	var text json.RawMessage
	if err := json.Unmarshal(body, &text); err != nil {
		return nil, MalformedError("The body is not valid JSON: " + err.Error() + ".")
	}
	members, err := scanText(text)
	if err != nil {
		return nil, err
	}
	if bytes.TrimLeft(text, space)[0] != '{' {
		return nil, InvalidError{{Pointer: "#", Detail: "must be an object"}}
	}
	return &decoder{members: members}, nil
}

// text takes a string and checks it by the given rules.
func (d *decoder) text(name string, p presence, check func(string) []string) Optional[string] {
	value, ok := d.take(name, p)
	if !ok || value == nil {
		return Optional[string]{Set: ok}
	}
	if value[0] != '"' {
		d.violate(name, "must be a string")
		return Optional[string]{}
	}
	s := unquote(value)
	for _, detail := range check(s) {
		d.violate(name, detail)
	}
	return Optional[string]{Set: true, Value: &s}
}

// boolean takes true or false.
func (d *decoder) boolean(name string, p presence) Optional[bool] {
	value, ok := d.take(name, p)
	if !ok {
		return Optional[bool]{}
	}
	b := string(value) == "true"
	if !b && string(value) != "false" {
		d.violate(name, "must be true or false")
	}
	return Optional[bool]{Set: true, Value: &b}
}

// take removes a member and returns its value, nil for an allowed null. It
// reports whether there is a value to look at.
func (d *decoder) take(name string, p presence) (value []byte, ok bool) {
	value, ok = d.members[name]
	delete(d.members, name)
	switch {
	case !ok && p == required:
		d.violate(name, "is required")
	case ok && string(value) == "null":
		if p != nullable {
			d.violate(name, "must not be null")
		}
		return nil, p == nullable
	}
	return value, ok
}

func (d *decoder) violate(name, detail string) {
	d.violations = append(d.violations, Violation{Pointer: pointer(name), Detail: detail})
}

// end reports as unknown what was neither taken nor is ignored, and returns all
// violations.
func (d *decoder) end(ignored ...string) error {
	for _, name := range slices.Sorted(maps.Keys(d.members)) {
		if !slices.Contains(ignored, name) {
			d.violate(name, "is not a member known here")
		}
	}
	if d.violations == nil {
		return nil
	}
	return d.violations
}

// pointer returns the JSON Pointer of a top-level member as a URI fragment.
func pointer(name string) string {
	fragment := url.URL{Fragment: "/" + strings.NewReplacer("~", "~0", "/", "~1").Replace(name)}
	return fragment.String()
}

// titleViolations says what is wrong with a title.
func titleViolations(s string) []string {
	violations := textViolations(s, maxTitle)
	if strings.TrimSpace(s) == "" {
		violations = append(violations, "must not be blank")
	}
	return violations
}

// descriptionViolations says what is wrong with a description.
func descriptionViolations(s string) []string {
	return textViolations(s, maxDescription)
}

// userIDViolations says what is wrong with a user_id, wherever it comes from.
func userIDViolations(s string) []string {
	violations := textViolations(s, maxUserID)
	if s == "" {
		violations = append(violations, "must not be empty")
	}
	return violations
}

func textViolations(s string, limit int) (violations []string) {
	if utf8.RuneCountInString(s) > limit {
		violations = append(violations, fmt.Sprintf("must have at most %d characters", limit))
	}
	if strings.ContainsRune(s, 0) {
		violations = append(violations, "must not contain U+0000")
	}
	return violations
}

// scanText walks a valid JSON text in search of what encoding/json lets pass: a
// name repeated within one object, at any depth, and half a surrogate pair. It
// returns the members of the outermost object, if the text is one.
func scanText(text []byte) (map[string][]byte, error) {
	var (
		members = make(map[string][]byte)
		scopes  []map[string][]byte // the objects around text[i], outermost first; nil for an array
		name    string              // of the outermost object's current member
		start   int                 // of that member's value
	)
	for i := 0; i < len(text); i++ {
		switch text[i] {
		case '{':
			scope := members
			if len(scopes) > 0 {
				scope = make(map[string][]byte)
			}
			scopes = append(scopes, scope)
		case '[':
			scopes = append(scopes, nil)
		case ',', '}', ']':
			if len(scopes) == 1 && start > 0 {
				members[name] = bytes.Trim(text[start:i], space)
				start = 0
			}
			if text[i] != ',' {
				scopes = scopes[:len(scopes)-1]
			}
		case '"':
			end, err := stringEnd(text, i)
			if err != nil {
				return nil, err
			}
			rest := bytes.TrimLeft(text[end:], space)
			if len(rest) > 0 && rest[0] == ':' {
				key, scope := unquote(text[i:end]), scopes[len(scopes)-1]
				if _, ok := scope[key]; ok {
					return nil, MalformedError(fmt.Sprintf("The body has the member %q twice.", key))
				}
				scope[key] = nil
				if len(scopes) == 1 {
					name, start = key, len(text)-len(rest)+1
				}
			}
			i = end - 1
		}
	}
	return members, nil
}

// space is JSON's white space (RFC 8259 §2).
const space = " \t\r\n"

// stringEnd returns the index behind the string that starts at text[i].
func stringEnd(text []byte, i int) (int, error) {
	for i++; text[i] != '"'; i++ {
		if text[i] != '\\' {
			continue
		}
		if i++; text[i] != 'u' {
			continue
		}
		if r := escaped(text[i-1:]); utf16.IsSurrogate(r) {
			if utf16.DecodeRune(r, escaped(text[i+5:])) == unicode.ReplacementChar {
				return 0, MalformedError(`The body has a \u escape that is half of a surrogate pair.`)
			}
			i += 6
		}
		i += 4
	}
	return i + 1, nil
}

// escaped returns the UTF-16 code unit of the \uXXXX that text begins with, or
// 0 where there is none.
func escaped(text []byte) rune {
	if len(text) < 6 || text[0] != '\\' || text[1] != 'u' {
		return 0
	}
	n, _ := strconv.ParseUint(string(text[2:6]), 16, 16)
	return rune(n)
}

// unquote returns the value of a JSON string that has passed scanText.
func unquote(quoted []byte) string {
	if bytes.IndexByte(quoted, '\\') < 0 {
		return string(quoted[1 : len(quoted)-1])
	}
	var s string
	json.Unmarshal(quoted, &s) // cannot fail on a valid string
	return s
}

// parseID returns the canonical form of a UUID in the textual form of RFC 9562
// §4, and reports whether s is one.
func parseID(s string) (id string, ok bool) {
	if len(s) != 36 || s[8] != '-' || s[13] != '-' || s[18] != '-' || s[23] != '-' {
		return "", false
	}
	var b [16]byte
	if n, err := hex.Decode(b[:], []byte(s[:8]+s[9:13]+s[14:18]+s[19:23]+s[24:])); n != len(b) || err != nil {
		return "", false
	}
	return strings.ToLower(s), true
}

// newID returns a UUID version 7 (RFC 9562 §5.7) for a task created at t. The 12
// bits behind the milliseconds hold their fraction (§6.2, method 3): two
// microseconds never share an id's first half, so ids sort as their times do.
func newID(t time.Time) string {
	var b [16]byte
	rand.Read(b[:])
	micros := uint64(t.UnixMicro())
	binary.BigEndian.PutUint64(b[:8], micros/1000<<16|7<<12|micros%1000*4096/1000)
	b[8] = b[8]&0x3f | 0x80 // RFC 9562's variant

	var s [36]byte
	hex.Encode(s[:8], b[:4])
	hex.Encode(s[9:13], b[4:6])
	hex.Encode(s[14:18], b[6:8])
	hex.Encode(s[19:23], b[8:10])
	hex.Encode(s[24:], b[10:])
	s[8], s[13], s[18], s[23] = '-', '-', '-', '-'
	return string(s[:])
}

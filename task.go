package main

// task.go is the domain: what a task is, what a client may send of it, the
// rules for both, and the errors of the package.

import (
	"cmp"
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
	"unicode/utf8"
)

// Limits of a task's texts, in Unicode code points. The constraints of
// schema.sql repeat them.
const maxUserID, maxTitle, maxDescription = 255, 200, 10_000

// Errors of a [Store].
var (
	ErrNotFound     = errors.New("not found")                                       // no such row, or another user's
	ErrPrecondition = errors.New("the version does not meet the condition")         // of the Target
	ErrKeyReused    = errors.New("the idempotency key was used with other content") // of Create
	ErrUnknownUser  = errors.New("the database does not know the user")             // of Create, by a foreign key on user_id
	ErrUnavailable  = errors.New("the database is unavailable")                     // a write may have been applied, or may still be
)

// Task is a task as it is stored, and as clients see it.
type Task struct {
	ID          string    `json:"id"` // UUID version 7, in lower case
	UserID      *string   `json:"user_id"`
	Title       string    `json:"title"`
	Description *string   `json:"description"`
	Completed   bool      `json:"completed"`
	Version     int64     `json:"version"` // 1 at creation, one more with each change
	CreatedAt   time.Time `json:"created_at"`
	UpdatedAt   time.Time `json:"updated_at"`
}

// resource is a type that a table stores and a response contains: Task, and any
// type that is added beside it.
type resource interface {
	identity() (id string, owner *string, version int64)
	appendJSON(b []byte) []byte // the JSON that clients see
}

func (t Task) identity() (id string, owner *string, version int64) { return t.ID, t.UserID, t.Version }

// appendJSON does not use encoding/json: its reflection took a quarter of the
// time of a list.
func (t Task) appendJSON(b []byte) []byte {
	b = append(append(b, `{"id":"`...), t.ID...)
	b = appendString(append(b, `","user_id":`...), t.UserID)
	b = appendString(append(b, `,"title":`...), &t.Title)
	b = appendString(append(b, `,"description":`...), t.Description)
	b = strconv.AppendBool(append(b, `,"completed":`...), t.Completed)
	b = strconv.AppendInt(append(b, `,"version":`...), t.Version, 10)
	b = appendTime(append(b, `,"created_at":`...), t.CreatedAt)
	b = appendTime(append(b, `,"updated_at":`...), t.UpdatedAt)
	return append(b, '}')
}

// TaskDraft is what a client sends to create a task. A digest of its JSON is
// stored with an idempotency key: a field that is added later must have the
// option omitzero, so that older digests still match.
type TaskDraft struct {
	UserID      *string
	Title       string
	Description *string
	Completed   bool
}

// TaskPatch is a change of a task. The zero TaskPatch changes nothing.
type TaskPatch struct {
	Title       *string
	Description Optional[string]
	Completed   *bool
}

// Optional is a member of an object in its three states: absent, null, and a value.
type Optional[T any] struct {
	Set   bool
	Value *T // nil for null and for absent
}

// Target selects one row, with conditions on its version.
type Target struct {
	ID           string  // in lower case
	Owner        *string // the row must belong to this user; nil: to anyone
	Match        []int64 // the row must have one of these versions; nil: any; empty but not nil: none matches
	NoneMatch    []int64 // and none of these
	NoneMatchAny bool    // and no version at all: the row must not exist
}

// excludes reports whether the row must not have this version.
func (t Target) excludes(version int64) bool {
	return t.NoneMatchAny || slices.Contains(t.NoneMatch, version)
}

// Filter selects a page.
type Filter struct {
	Owner      *string // nil: rows of everyone
	Completed  *bool   // nil: both
	Descending bool    // newest first
	After      string  // id, a UUID, after which the page starts; "": the first page
	Limit      int     // at most this many rows; not negative
}

// InvalidError is the error of well-formed input that breaks rules. It lists
// every broken rule.
type InvalidError []Violation

// Violation is one broken rule. Exactly one of Pointer, Parameter and Header
// says where.
type Violation struct {
	Detail    string `json:"detail"`
	Pointer   string `json:"pointer,omitempty"`   // JSON Pointer into the body, as a URI fragment (RFC 6901 §6)
	Parameter string `json:"parameter,omitempty"` // name of a query parameter
	Header    string `json:"header,omitempty"`    // name of a header field
}

func (e InvalidError) Error() string { return fmt.Sprintf("invalid: %v", []Violation(e)) }

// malformedError is the error of a body that cannot be read or is not one
// well-formed JSON text.
// Its value is a sentence for the client.
type malformedError string

func (e malformedError) Error() string { return string(e) }

// decodeTaskDraft decodes the body of a POST. Its error, like those of the other
// decode functions, is a malformedError or an [InvalidError].
func decodeTaskDraft(body []byte) (TaskDraft, error) {
	d := newDecoder(body)
	owner, p := d.text("user_id", nullable, userIDViolations).Value, d.task(required)
	return TaskDraft{owner, *cmp.Or(p.Title, new("")), p.Description.Value, *cmp.Or(p.Completed, new(false))}, d.end()
}

// decodeReplacement decodes the body of a PUT: a patch of all that can be changed.
func decodeReplacement(body []byte) (TaskPatch, error) {
	d := newDecoder(body)
	p := d.task(required)
	p.Description.Set, p.Completed = true, cmp.Or(p.Completed, new(false))
	return p, d.end()
}

// decodeTaskPatch decodes the body of a PATCH, a JSON Merge Patch (RFC 7396).
func decodeTaskPatch(body []byte) (TaskPatch, error) {
	d := newDecoder(body)
	return d.task(optional), d.end()
}

// decodeCompletion decodes the body of a PATCH of the completion.
func decodeCompletion(body []byte) (TaskPatch, error) {
	d := newDecoder(body)
	p := TaskPatch{Completed: take[bool](d, "completed", required, "must be true or false").Value}
	err := d.end()
	invalid, _ := err.(InvalidError)
	for i := range invalid {
		invalid[i].Detail += "; or send no body"
	}
	return p, err
}

// task takes the members that a client may set at any time.
func (d *decoder) task(title presence) TaskPatch {
	return TaskPatch{
		Title:       d.text("title", title, titleViolations).Value,
		Description: d.text("description", nullable, descriptionViolations),
		Completed:   take[bool](d, "completed", optional, "must be true or false").Value,
	}
}

// titleViolations says what is wrong with a title.
func titleViolations(s string) []string {
	return textViolations(s, maxTitle, strings.TrimSpace(s) == "", "must not be blank")
}

// descriptionViolations says what is wrong with a description.
func descriptionViolations(s string) []string { return textViolations(s, maxDescription, false, "") }

// userIDViolations says what is wrong with a user id, wherever it comes from.
func userIDViolations(s string) []string {
	return textViolations(s, maxUserID, s == "", "must not be empty")
}

// textViolations says what is wrong with a text. empty reports whether it counts
// as empty, and detail is the violation for that.
func textViolations(s string, limit int, empty bool, detail string) (violations []string) {
	if utf8.RuneCountInString(s) > limit {
		violations = append(violations, fmt.Sprintf("must have at most %d characters", limit))
	}
	if strings.ContainsRune(s, 0) {
		violations = append(violations, "must not contain U+0000")
	}
	if empty {
		violations = append(violations, detail)
	}
	return violations
}

// presence says whether a member must be there, and whether it may be null.
type presence int

const (
	required presence = iota
	optional          // may be absent, may not be null
	nullable          // may be absent or null
)

// decoder takes the members of a JSON object one by one and collects every rule
// that they break.
type decoder struct {
	members    map[string]json.RawMessage // those not yet taken
	violations InvalidError
	err        error // the body is no object, or not even well-formed
}

func newDecoder(body []byte) *decoder {
	if len(body) == 0 {
		return &decoder{err: malformedError("A body is required.")}
	}
	if err := checkJSON(body); err != nil {
		return &decoder{err: malformedError("The body is not valid JSON: " + err.Error() + ".")}
	}
	d := &decoder{}
	if json.Unmarshal(body, &d.members) != nil || d.members == nil {
		d.err = InvalidError{{Pointer: "#", Detail: "must be an object"}}
	}
	return d
}

// text takes a string and checks it.
func (d *decoder) text(name string, p presence, violations func(string) []string) Optional[string] {
	s := take[string](d, name, p, "must be a string")
	if s.Value != nil {
		for _, detail := range violations(*s.Value) {
			d.violate(name, detail)
		}
	}
	return s
}

// take takes a member. wrongType is the detail for a value of another type. A
// member of the wrong type counts as absent.
func take[T any](d *decoder, name string, p presence, wrongType string) Optional[T] {
	text, ok := d.members[name]
	delete(d.members, name)
	var value *T
	switch {
	case !ok && p == required:
		d.violate(name, "is required")
	case ok && p != nullable && string(text) == "null":
		d.violate(name, "must not be null")
	case ok && json.Unmarshal(text, &value) != nil:
		d.violate(name, wrongType)
	default:
		return Optional[T]{ok, value}
	}
	return Optional[T]{}
}

// violate records a broken rule of a top-level member.
func (d *decoder) violate(name, detail string) {
	fragment := url.URL{Fragment: "/" + strings.NewReplacer("~", "~0", "/", "~1").Replace(name)}
	d.violations = append(d.violations, Violation{Pointer: fragment.String(), Detail: detail})
}

// end returns what is wrong with the body: its form, or else every broken rule.
// A member that was not taken is unknown unless it is read-only.
func (d *decoder) end() error {
	for _, name := range slices.Sorted(maps.Keys(d.members)) {
		if !slices.Contains([]string{"id", "user_id", "version", "created_at", "updated_at"}, name) {
			d.violate(name, "unknown member")
		}
	}
	if d.err == nil && d.violations != nil {
		return d.violations
	}
	return d.err
}

// parseID returns the canonical form of a UUID in the textual form of RFC 9562
// §4, and reports whether s is one.
func parseID(s string) (id string, ok bool) {
	b, err := hex.DecodeString(strings.ReplaceAll(s, "-", ""))
	ok = err == nil && len(b) == 16 && len(s) == 36 && s[8] == '-' && s[13] == '-' && s[18] == '-' && s[23] == '-'
	return strings.ToLower(s), ok
}

// newID returns a UUID version 7 (RFC 9562 §5.7) for a row created at t. The 12
// bits after the milliseconds hold their fraction (§6.2, method 3). Each
// microsecond has its own first 64 bits, so ids sort as their times do.
func newID(t time.Time) string {
	var b [16]byte
	rand.Read(b[:])
	micros := uint64(t.UnixMicro())
	binary.BigEndian.PutUint64(b[:8], micros/1000<<16|7<<12|micros%1000*4096/1000)
	b[8] = b[8]&0x3f | 0x80 // RFC 9562's variant
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

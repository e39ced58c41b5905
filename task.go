package main

// task.go is the domain: what a task is, what a client may send of it, the
// rules for both, and the errors that operations on tasks have. It knows
// neither HTTP nor SQL.

import (
	"bytes"
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
			b = append(b, '\\', 'u', '0', '0', '0'+c>>4)
			b = append(b, "0123456789abcdef"[c&0xf])
			rest, i = rest[i+1:], -1
		}
	}
	b = append(b, rest...)
	return append(b, '"')
}

// Target names the one task that an operation is for, and on what conditions.
type Target struct {
	ID       string  // in lower case, as [Task] has it
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

// Patch is what a client wants to change of a task. The zero Patch changes nothing.
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

func (e InvalidError) Error() string { return fmt.Sprintf("invalid: %v", []Violation(e)) }

// MalformedError is the error of a body that is not one well-formed JSON text.
// Its value says, to the client, what is wrong.
type MalformedError string

func (e MalformedError) Error() string { return string(e) }

// DecodeNewTask decodes the body of a POST. Its error, like those of the other
// Decode functions, is a [MalformedError] or an [InvalidError].
func DecodeNewTask(body []byte) (NewTask, error) {
	d := newDecoder(body)
	t := NewTask{
		UserID:      d.text("user_id", nullable, userIDViolations).Value,
		Title:       *cmp.Or(d.text("title", required, titleViolations).Value, new("")),
		Description: d.text("description", nullable, descriptionViolations).Value,
		Completed:   *cmp.Or(d.boolean("completed", optional), new(false)),
	}
	return t, d.end()
}

// DecodeReplacement decodes the body of a PUT: a patch of all that there is.
func DecodeReplacement(body []byte) (Patch, error) {
	d := newDecoder(body)
	p := Patch{
		Title:       d.text("title", required, titleViolations).Value,
		Description: Optional[string]{true, d.text("description", nullable, descriptionViolations).Value},
		Completed:   cmp.Or(d.boolean("completed", optional), new(false)),
	}
	return p, d.end()
}

// DecodePatch decodes the body of a PATCH, a JSON Merge Patch (RFC 7396).
func DecodePatch(body []byte) (Patch, error) {
	d := newDecoder(body)
	p := Patch{
		Title:       d.text("title", optional, titleViolations).Value,
		Description: d.text("description", nullable, descriptionViolations),
		Completed:   d.boolean("completed", optional),
	}
	return p, d.end()
}

// DecodeCompletion decodes the body of a PATCH of the completion: a patch of
// that alone.
func DecodeCompletion(body []byte) (Patch, error) {
	d := newDecoder(body)
	p := Patch{Completed: d.boolean("completed", required)}
	return p, d.end()
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
	d := &decoder{err: checkForm(body)}
	if d.err == nil && (json.Unmarshal(body, &d.members) != nil || d.members == nil) {
		d.err = InvalidError{{Pointer: "#", Detail: "must be an object"}}
	}
	return d
}

// text takes a string and checks it by the given rules.
func (d *decoder) text(name string, p presence, check func(string) []string) Optional[string] {
	s := take[string](d, name, p, "must be a string")
	if s.Value != nil {
		for _, detail := range check(*s.Value) {
			d.violate(name, detail)
		}
	}
	return s
}

// boolean takes true or false.
func (d *decoder) boolean(name string, p presence) *bool {
	return take[bool](d, name, p, "must be true or false").Value
}

// take takes a member. One that breaks a rule counts as absent; rule is the one
// that it breaks if it is of another type.
func take[T any](d *decoder, name string, p presence, rule string) Optional[T] {
	text, ok := d.members[name]
	delete(d.members, name)
	var value *T
	switch {
	case !ok && p == required:
		d.violate(name, "is required")
	case ok && p != nullable && string(text) == "null":
		d.violate(name, "must not be null")
	case ok && json.Unmarshal(text, &value) != nil:
		d.violate(name, rule)
	default:
		return Optional[T]{ok, value}
	}
	return Optional[T]{}
}

func (d *decoder) violate(name, detail string) {
	d.violations = append(d.violations, Violation{Pointer: pointer(name), Detail: detail})
}

// end returns what is wrong with the body: its form, or else all violations, of
// which a member that was not taken is one unless it is read-only.
func (d *decoder) end() error {
	for _, name := range slices.Sorted(maps.Keys(d.members)) {
		if !slices.Contains([]string{"id", "user_id", "version", "created_at", "updated_at"}, name) {
			d.violate(name, "is not a member known here")
		}
	}
	if d.err == nil && d.violations != nil {
		return d.violations
	}
	return d.err
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

// checkForm returns a [MalformedError] unless body is one well-formed JSON text.
// It is stricter than encoding/json, which lets pass invalid UTF-8, half a
// surrogate pair, and a name repeated within one object.
func checkForm(body []byte) error {
	if len(body) == 0 {
		return MalformedError("A body is required.")
	}
	if !utf8.Valid(body) {
		return MalformedError("The body is not valid UTF-8.")
	}
	if err := json.Unmarshal(body, new(json.RawMessage)); err != nil {
		return MalformedError("The body is not valid JSON: " + err.Error() + ".")
	}
	if hasHalfPair(body) {
		return MalformedError(`The body has a \u escape that is half of a surrogate pair.`)
	}
	return checkNames(body)
}

// hasHalfPair reports whether a valid JSON text, which has backslashes in strings
// only, has an escape that is half of a surrogate pair.
func hasHalfPair(text []byte) bool {
	for {
		i := bytes.IndexByte(text, '\\')
		if i < 0 {
			return false
		}
		r := escaped(text[i:])
		text = text[i+len(`\n`):]
		if utf16.IsSurrogate(r) {
			text = text[len(`0000`):]
			if utf16.DecodeRune(r, escaped(text)) == unicode.ReplacementChar {
				return true
			}
			text = text[len(`\u0000`):]
		}
	}
}

// checkNames returns an error if a valid JSON text has an object, at any depth,
// with the same name twice.
func checkNames(text []byte) error {
	var scopes []map[string]bool // the names in the objects around text[i]; nil for an array
	for i := 0; i < len(text); i++ {
		switch text[i] {
		case '{':
			scopes = append(scopes, map[string]bool{})
		case '[':
			scopes = append(scopes, nil)
		case '}', ']':
			scopes = scopes[:len(scopes)-1]
		case '"':
			begin := i
			for i++; text[i] != '"'; i++ {
				if text[i] == '\\' {
					i++
				}
			}
			if rest := bytes.TrimLeft(text[i+1:], " \t\r\n"); len(rest) == 0 || rest[0] != ':' {
				continue // a value
			}
			var name string
			json.Unmarshal(text[begin:i+1], &name) // cannot fail
			names := scopes[len(scopes)-1]
			if names[name] {
				return MalformedError(fmt.Sprintf("The body has the member %q twice.", name))
			}
			names[name] = true
		}
	}
	return nil
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
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

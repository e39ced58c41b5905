package main

// task_test.go tests what needs neither HTTP nor a database: what the errors of
// a body say, ids, and with fuzz targets that the decoder and the query parser
// do what a plain reading of the contract does.

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"
)

func TestDecodeErrors(t *testing.T) {
	t.Parallel()
	all := readings()
	for _, tt := range []struct{ operation, body, want string }{
		{"POST", "", "A body is required."},
		{"POST", "\"\xff\"", "The body is not valid JSON: invalid UTF-8."},
		{"PATCH", `{"a\"":1,"\u0061\"":2}`, `The body is not valid JSON: the member "a\"" is repeated.`},
		{"PATCH", `{"title":"\udead"}`, `The body is not valid JSON: a \u escape that is half of a surrogate pair.`},
		{"PATCH", ` []`, "#: must be an object"},
		{"PUT", `{}`, "#/title: is required"},
		{"PATCH", `{"title":null}`, "#/title: must not be null"},
		{"PATCH", `{"description":[]}`, "#/description: must be a string"},
		{"complete", `{"completed":"true"}`, "#/completed: must be true or false; or send no body"},
		{"complete", `{}`, "#/completed: is required; or send no body"},
		{"complete", `null`, "#: must be an object; or send no body"},
		{"PATCH", `{"title":"\u2003"}`, "#/title: must not be blank"},
		{"POST", `{"title":"a","user_id":""}`, "#/user_id: must not be empty"},
		{"PATCH", `{"title":"` + strings.Repeat("é", 201) + `"}`, "#/title: must have at most 200 characters"},
		{"PATCH", `{"description":"\u0000"}`, "#/description: must not contain U+0000"},
		{"POST", `{"title":"","description":0,"completed":null,"user_id":false,"b":0,"B":0}`,
			"#/user_id: must be a string; #/title: must not be blank; #/description: must be a string; #/completed: must not be null; " +
				"#/B: unknown member; #/b: unknown member"},
	} {
		_, err := all[tt.operation].decode([]byte(tt.body))
		got := fmt.Sprint(err)
		if invalid, ok := err.(InvalidError); ok {
			var lines []string
			for _, v := range invalid {
				lines = append(lines, v.Pointer+": "+v.Detail)
			}
			got = strings.Join(lines, "; ")
		}
		if got != tt.want {
			t.Errorf("%s:\n got %s\nwant %s", tt.body, got, tt.want)
		}
	}
}

func TestPointer(t *testing.T) {
	t.Parallel()
	for name, want := range map[string]string{
		"": "#/", "title": "#/title", "a/b": "#/a~1b", "m~n": "#/m~0n", "~1": "#/~01", "50%": "#/50%25", "%2F": "#/%252F",
		" ": "#/%20", `"\`: "#/%22%5C", "#": "#/%23", "é": "#/%C3%A9", "\x00": "#/%00",
	} {
		var d decoder
		if d.violate(name, ""); d.violations[0].Pointer != want {
			t.Errorf("%q: got %s, want %s", name, d.violations[0].Pointer, want)
		}
	}
}

// Ids carry their time, to the microsecond, and sort by it.
func TestNewID(t *testing.T) {
	t.Parallel()
	form := regexp.MustCompile("^[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$")
	begin := time.Date(2026, 3, 4, 5, 6, 7, 0, time.UTC)
	last := strings.Repeat("0", 18)
	for i := range 10_000 { // ten of them begin a millisecond
		at := begin.Add(time.Duration(i) * time.Microsecond)
		id := newID(at)
		if millis := fmt.Sprintf("%012x", at.UnixMilli()); !form.MatchString(id) || id[:18] <= last || strings.ReplaceAll(id[:13], "-", "") != millis {
			t.Fatalf("%s of %v comes after %s", id, at, last)
		}
		last = id[:18]
	}
	if a, b := newID(begin), newID(begin); a == b {
		t.Error("two ids of the same time are the same")
	}
	for at, want := range map[time.Time]string{
		time.UnixMicro(0): "00000000-0000-7000", time.UnixMicro(999): "00000000-0000-7ffb", time.UnixMicro(1000): "00000000-0001-7000",
		time.Date(10889, 8, 2, 5, 31, 50, 655e6, time.UTC): "ffffffff-ffff-7000", // the last millisecond there is
	} {
		if got := newID(at); got[:18] != want {
			t.Errorf("%v: got %s, want %s-…", at, got, want)
		}
	}
}

func TestParseID(t *testing.T) {
	t.Parallel()
	const id, rest = "019c2292-294b-774b-8e0f-5b3a1f6c9d42", "2292-294b-774b-8e0f-5b3a1f6c9d42"
	const least, most = "00000000-0000-0000-0000-000000000000", "ffffffff-ffff-ffff-ffff-ffffffffffff"
	for s, want := range map[string]string{
		id: id, strings.ToUpper(id): id, strings.ToUpper(id[:19]) + id[19:]: id, least: least, strings.ToUpper(most): most,
		"": "", "tasks": "", "{" + id + "}": "", "urn:uuid:" + id: "", id[:35]: "", id + "0": "",
		strings.ReplaceAll(id, "-", ""): "", strings.ReplaceAll(id, "-", "0"): "", strings.ReplaceAll(id, "-", "_"): "",
		"019c2292294b--774b-8e0f-5b3a1f6c9d42": "", id[:35] + "g": "", id[:35] + " ": "", " " + id[1:]: "", id[:34] + "\xff0": "",
		"+19c" + rest: "", "0x9c" + rest: "", "0１" + rest: "", "%19c" + rest: "",
	} {
		if got, ok := parseID(s); ok != (want != "") || ok && got != want {
			t.Errorf("%q: got %q, %t, want %q", s, got, ok, want)
		}
	}
}

// reading is an operation's body as the contract describes it: for each member
// that is not ignored, whether a value, nil for null, is allowed.
type reading struct {
	decode   func(body []byte) (map[string]any, error) // the decoder under test; a member that is absent and one that is null look alike but to PATCH
	required string
	members  map[string]func(value any) bool
	ignored  []string
}

func readings() map[string]reading {
	text := func(low, high int, null bool) func(any) bool {
		return func(value any) bool {
			s, ok := value.(string)
			if !ok {
				return value == nil && null
			}
			n := utf8.RuneCountInString(s)
			return low <= n && n <= high && !strings.Contains(s, "\x00")
		}
	}
	title := func(value any) bool {
		s, _ := value.(string)
		return text(1, 200, false)(value) && strings.ContainsFunc(s, func(r rune) bool { return !unicode.Is(unicode.White_Space, r) })
	}
	boolean := func(value any) bool { _, ok := value.(bool); return ok }
	writable := map[string]func(any) bool{"title": title, "description": text(0, 10_000, true), "completed": boolean}
	ignored := []string{"id", "version", "created_at", "updated_at", "user_id"}
	orNil := func(s *string) any {
		if s == nil {
			return nil
		}
		return *s
	}
	return map[string]reading{
		"POST": {
			func(body []byte) (map[string]any, error) {
				n, err := decodeTaskDraft(body)
				return map[string]any{"title": n.Title, "description": orNil(n.Description), "completed": n.Completed, "user_id": orNil(n.UserID)}, err
			},
			"title", map[string]func(any) bool{"title": title, "description": text(0, 10_000, true), "completed": boolean, "user_id": text(1, 255, true)}, ignored[:4],
		},
		"PUT": {
			func(body []byte) (map[string]any, error) {
				p, err := decodeReplacement(body)
				return map[string]any{"title": orNil(p.Title), "description": orNil(p.Description.Value), "completed": *p.Completed}, err
			},
			"title", writable, ignored,
		},
		"PATCH": {
			func(body []byte) (map[string]any, error) {
				p, err := decodeTaskPatch(body)
				got := map[string]any{}
				if p.Title != nil {
					got["title"] = *p.Title
				}
				if p.Description.Set {
					got["description"] = orNil(p.Description.Value)
				}
				if p.Completed != nil {
					got["completed"] = *p.Completed
				}
				return got, err
			},
			"", writable, ignored,
		},
		"complete": {
			func(body []byte) (map[string]any, error) {
				p, err := decodeCompletion(body)
				return map[string]any{"completed": p.Completed != nil && *p.Completed}, err
			},
			"completed", map[string]func(any) bool{"completed": boolean}, ignored,
		},
	}
}

// wellFormed reports whether a body is one well-formed JSON text. What
// encoding/json lets pass it finds by other means than the decoder.
func wellFormed(body []byte) bool {
	if !utf8.Valid(body) || !json.Valid(body) {
		return false
	}
	// With the pairs taken away, what is left of surrogates is halves.
	escapes := regexp.MustCompile(`\\\\|\\u[dD][89abAB]..\\u[dD][c-fC-F]..`).ReplaceAll(body, nil)
	if regexp.MustCompile(`\\u[dD][89a-fA-F]`).Match(escapes) {
		return false
	}
	type scope struct {
		names map[string]bool // nil: an array
		value bool            // the next token is no name
	}
	tokens := json.NewDecoder(bytes.NewReader(body))
	tokens.UseNumber()
	scopes := []scope{{}}
	for {
		token, err := tokens.Token()
		if err != nil {
			return true // the end
		}
		top := &scopes[len(scopes)-1]
		name, isName := token.(string)
		isName = isName && top.names != nil && !top.value
		if isName && top.names[name] {
			return false
		}
		if isName {
			top.names[name] = true
		}
		top.value = isName
		switch token {
		case json.Delim('{'):
			scopes = append(scopes, scope{names: map[string]bool{}})
		case json.Delim('['):
			scopes = append(scopes, scope{})
		case json.Delim('}'), json.Delim(']'):
			scopes = scopes[:len(scopes)-1]
		}
	}
}

// expect returns what comes of a body: the values of the members, or where the
// violations are.
func (r reading) expect(body []byte) (values map[string]any, violations []string) {
	var value any
	json.Unmarshal(body, &value) // well-formed
	object, ok := value.(map[string]any)
	if !ok {
		return nil, []string{"#"}
	}
	if _, ok := object[r.required]; !ok && r.required != "" {
		violations = append(violations, r.required)
	}
	values = map[string]any{}
	for name, value := range object {
		allowed, known := r.members[name]
		switch {
		case known && allowed(value):
			values[name] = value
		case known || !slices.Contains(r.ignored, name):
			violations = append(violations, name)
		}
	}
	return values, violations
}

func FuzzDecode(f *testing.F) {
	for _, body := range []string{
		`{"title":"a","description":null,"completed":true,"user_id":"alice"}`,
		` { "title" : "\ud83d\ude42\\\"\/\b" , "id" : [ { "x" : 1 } , { "x" : -1e5 } ] } `,
		`{"title":"\u0000 \u2003","completed":false,"Title":1,"a/b~%":{}}`, `{"title":"\u200b\ufeff\u180e"}`,
		`{"title":"a","\u0074itle":"a"}`, `{"title":"a","🙂":1,"\ud83d\ude42":1}`, `{"title":"a","":1,"":1}`, `[{"x":1,"x":1}]`,
		`{"title":"a","id":{"x":1,"y":[{"x":[]}],"x":{}}}`, `{"title":"a","id":{"x":{"x":[{"x":1},{"x":1}]},"title":1}}`,
		`{"title":"\ud83d","description":"\ude42"}`, `{"title":"\ud83d\n"}`, `{"title":"\uDE00\uD83D"}`, `{"title":"\ud83d \ude00"}`,
		`{"title":"\\ud83d","description":"\\\ud83d"}`, `{"title":"\\ud83d","id":"\\\\u"}`, `"\ud83d"`, `{"title":"a","\ud83d":1}`,
		`{"title":"\ud83d\u0041","description":"\ud83d\ud83d\ude42"}`, `{"title":"\ud83d\ude00\ude00"}`, `{"title":"a","id":["\ud83d"]}`,
		`{"title":"\uFFFD","description":"\ufffd` + "\ufffd" + `"}`, `{"title":"\x61"}`, `{"title":"\u061"}`, `{"title":"a\`,
		`{"":{"":{"":{}}}}`, `[[{},{}],"a:","{",":"]`, `{"completed":true}`, `{"completed":null,"title":null}`, `{}`, `[]`, `null`, `""`, `0`, ``, ` `,
		"{\"title\":\"\xed\xa0\x80\"}", "{\"title\":\"\xf0\x9f\x99\"}", "{\"title\":\"\xc0\xaf\"}", "{\"title\":\"\xf4\x90\x80\x80\"}", "{\"\xff\":1}",
		"\ufeff{}", "\u00a0{}", "{\x00}\x00", "{\"title\":\"a\nb\"}", "{\"title\":\"a\x00\"}", "{}\xff", `{"title":"a"}{}`, `{"a":"b:","c":"d"}`, `{"a":"b" ,"c" :"d"}`,
		`{"a":1,}`, `{"a":1 "b":1}`, `{"a" 1}`, `{a:1}`, `{'a':1}`, `{"a":1/**/}`, `{"completed":True}`, `{"id":NaN}`, `{"id":01}`, `{"id":[[1e999]]}`, `title=a`, `{"title":"a"`, `{}x`,
		`{"de\u017fcription":"b","ID":1,"completed":1}`, `{"title":{"title":"a"},"description":1,"completed":[true],"user_id":{}}`,
	} {
		f.Add([]byte(body))
	}
	all := readings()
	f.Fuzz(func(t *testing.T, body []byte) {
		for _, operation := range slices.Sorted(maps.Keys(all)) {
			r := all[operation]
			got, err := r.decode(body)
			if _, malformed := err.(malformedError); malformed || !wellFormed(body) {
				if malformed == wellFormed(body) {
					t.Fatalf("%s: %v", operation, err)
				}
				continue
			}
			want, places := r.expect(body)
			var found []string
			if err != nil {
				for _, v := range err.(InvalidError) {
					found = append(found, member(t, v.Pointer))
				}
			}
			slices.Sort(places)
			slices.Sort(found)
			if found = slices.Compact(found); !slices.Equal(found, places) {
				t.Fatalf("%s: violations at %q, want %q", operation, found, places)
			}
			for name, value := range got {
				if wanted := want[name]; err == nil && !reflect.DeepEqual(value, wanted) && !(wanted == nil && value == false) {
					t.Fatalf("%s: %s is %#v, want %#v", operation, name, value, wanted)
				}
			}
			if err == nil && operation == "PATCH" && len(got) != len(want) {
				t.Fatalf("%s: got %v, want %v", operation, got, want)
			}
		}
	})
}

// member returns the name of the member that a pointer is for, or # for all.
func member(t *testing.T, pointer string) string {
	t.Helper()
	u, err := url.Parse(pointer)
	if err != nil || pointer[0] != '#' {
		t.Fatalf("the pointer %q: %v", pointer, err)
	}
	if u.Fragment == "" {
		return "#"
	}
	return strings.NewReplacer("~0", "~", "~1", "/").Replace(u.Fragment[1:])
}

func FuzzReadQuery(f *testing.F) {
	for _, query := range []string{
		"", "&", "user_id=alice&completed=true&sort=-created_at&limit=20&after=019C2292-294b-774b-8e0f-5b3a1f6c9d42", "a;b", "userid", "user_id",
		"user_id=a%26b+c&limit=007", "user_id=%zz", "user_id=%", "user_id=%00", "user_id=%ff", "user_id=\xff", "user_id=%ED%A0%80", "user_id=a;b", "user_id=a&user%5Fid=a",
		"colour=red", "Limit=1", "limit", "limit=", "=", "=limit", "limit=+1", "limit=%2B1", "limit=-1", "limit=1.0", "limit=1e2", "limit=0x10", "limit=1_0", "limit=ten",
		"limit=1001", "limit=65537", "limit=18446744073709551617", "completed=TRUE", "completed=1", "completed", "sort=title", "sort=%2Bcreated_at", "sort=-CREATED_AT",
		"after=1", "after=", "after=%7B019c2292-294b-774b-8e0f-5b3a1f6c9d42%7D", "user_id=a&user_id=%zz", "%zz", ";", "user_id=" + strings.Repeat("é", 256),
	} {
		f.Add(query)
	}
	known := []string{"user_id", "completed", "sort", "limit", "after"}
	f.Fuzz(func(t *testing.T, query string) {
		r := &request{Request: &http.Request{URL: &url.URL{RawQuery: query}}}
		violations, _ := r.readQuery(known, nil).(InvalidError)
		values, err := url.ParseQuery(query)
		valid := err == nil
		for name, all := range values {
			valid = valid && len(all) == 1
			if value := all[0]; valid {
				switch name {
				case "user_id":
					n := utf8.RuneCountInString(value)
					valid = 1 <= n && n <= 255 && utf8.ValidString(value) && !strings.Contains(value, "\x00")
				case "completed":
					valid = value == "true" || value == "false"
				case "sort":
					valid = value == "created_at" || value == "-created_at"
				case "limit":
					valid = regexp.MustCompile("^0*([1-9][0-9]{0,2}|1000)$").MatchString(value)
				case "after":
					valid = regexp.MustCompile("(?i)^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$").MatchString(value)
				default:
					valid = false
				}
			}
		}
		if valid != (violations == nil) {
			t.Fatalf("violations %v, but valid is %t", violations, valid)
		}
		for _, v := range violations {
			if v.Parameter == "" || v.Detail == "" || v.Pointer != "" || v.Header != "" {
				t.Errorf("violation %+v", v)
			}
		}
		if !valid {
			return
		}
		want := Filter{Limit: 100, Descending: values.Get("sort") == "-created_at", After: strings.ToLower(values.Get("after"))}
		if values.Has("user_id") {
			want.Owner = new(values.Get("user_id"))
		}
		if values.Has("completed") {
			want.Completed = new(values.Get("completed") == "true")
		}
		if values.Has("limit") {
			fmt.Sscanf(values.Get("limit"), "%d", &want.Limit)
		}
		if !reflect.DeepEqual(r.Filter, want) || !maps.EqualFunc(r.query, values, slices.Equal) {
			t.Errorf("got %+v of %v, want %+v of %v", r.Filter, r.query, want, values)
		}
	})
}

// A task as JSON is what encoding/json makes of it, by value, but for its times,
// which have six fractional digits.
func FuzzTaskJSON(f *testing.F) {
	f.Add("a", "\x01\b\t\n\f\r\x1f\"\\/<>&\u007f\u2028\u2029\ufffd🙂", "", int64(1), int64(0))
	f.Add("\\", "\"", "é", int64(1)<<62, int64(1767225600000000))
	f.Fuzz(func(t *testing.T, title, description, owner string, version, micros int64) {
		task := Task{ID: "019c2292-294b-774b-8e0f-5b3a1f6c9d42", Title: title, Version: version, Completed: version%2 == 0,
			CreatedAt: time.UnixMicro(micros % 250e15).UTC(), UpdatedAt: time.UnixMicro(micros%250e15 + 1).UTC()}
		if description != "" {
			task.Description = &description
		}
		if owner != "" {
			task.UserID = &owner
		}
		want, err := json.Marshal(task)
		if err != nil || !utf8.ValidString(title+"."+description+"."+owner) {
			return // cannot be stored
		}
		got := task.appendJSON(nil)
		var gotValue, wantValue map[string]any
		if err := json.Unmarshal(got, &gotValue); err != nil {
			t.Fatalf("%v: %s", err, got)
		}
		json.Unmarshal(want, &wantValue)
		wantValue["created_at"] = task.CreatedAt.Format("2006-01-02T15:04:05.000000Z")
		wantValue["updated_at"] = task.UpdatedAt.Format("2006-01-02T15:04:05.000000Z")
		if !reflect.DeepEqual(gotValue, wantValue) {
			t.Errorf("got  %s\nwant %s", got, want)
		}
	})
}

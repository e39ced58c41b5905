package main

// openapi_test.go compares openapi.json with the service. The other tests hand
// each request and its response to [spec.check]; the tests below look at the
// document by itself and at the route table.

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"math"
	"mime"
	"net/http"
	"net/http/httptest"
	"net/url"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"
)

// spec is openapi.json, as it decodes into an any.
type spec struct {
	doc      map[string]any
	patterns sync.Map // from a regular expression's text to its *regexp.Regexp
}

// loadSpec returns the spec of openapi.json. It is safe for concurrent use.
func loadSpec(t testing.TB) *spec {
	t.Helper()
	s, err := readSpec()
	if err != nil {
		t.Fatalf("openapi.json: %v", err)
	}
	return s
}

var readSpec = sync.OnceValues(func() (*spec, error) {
	doc, err := decodeJSON(openAPI)
	object, _ := doc.(map[string]any)
	return &spec{doc: object}, err
})

// decodeJSON decodes one JSON text; its numbers become a [json.Number].
func decodeJSON(text []byte) (value any, err error) {
	d := json.NewDecoder(bytes.NewReader(text))
	d.UseNumber()
	if err = d.Decode(&value); err == nil && d.Decode(new(any)) != io.EOF {
		err = fmt.Errorf("data after the value")
	}
	return value, err
}

// get returns the object at the end of a path of member names, nil where there is
// none. It follows each $ref on the way.
func (s *spec) get(node any, names ...string) map[string]any {
	object, _ := node.(map[string]any)
	if ref, ok := object["$ref"].(string); ok {
		object = s.get(s.doc, strings.Split(strings.TrimPrefix(ref, "#/"), "/")...)
	}
	if len(names) == 0 || object == nil {
		return object
	}
	return s.get(object[names[0]], names[1:]...)
}

// path returns the template of a request's path, "" where the document has none.
func (s *spec) path(requested string) string {
	if strings.HasPrefix(requested, "/api/tasks/") || strings.HasPrefix(requested, "/%61pi/") {
		requested = strings.TrimSuffix(requested, "/") // the same resource
	}
	segments := strings.Split(requested, "/")
	for template := range s.get(s.doc, "paths") {
		if slices.EqualFunc(strings.Split(template, "/"), segments, func(want, segment string) bool {
			name, err := url.PathUnescape(segment)
			return err == nil && (name == want || name != "" && name != "/" && strings.HasPrefix(want, "{"))
		}) {
			return template
		}
	}
	return ""
}

// methods returns the methods of a path, in order.
func (s *spec) methods(template string) (methods []string) {
	for name := range s.get(s.doc, "paths", template) {
		methods = append(methods, strings.ToUpper(name))
	}
	if slices.Contains(methods, "GET") {
		methods = append(methods, "HEAD")
	}
	return slices.Sorted(slices.Values(methods))
}

// parameters returns the parameters of an operation that are in the given place, by name.
func (s *spec) parameters(operation map[string]any, in string) map[string]map[string]any {
	found := make(map[string]map[string]any)
	list, _ := operation["parameters"].([]any)
	for _, p := range list {
		if p := s.get(p); p["in"] == in {
			found[p["name"].(string)] = p
		}
	}
	return found
}

// check fails the test where a request and its response are not what the
// document says: the path, method, status, headers, media type and body. A
// request that succeeded must satisfy the document, and one that was refused
// with 422 must not. req is as it was sent, reqBody its body.
func (s *spec) check(t testing.TB, req *http.Request, reqBody []byte, resp *http.Response, respBody []byte) {
	t.Helper()
	fail := func(format string, args ...any) {
		t.Helper()
		t.Errorf("openapi.json: %s %s: %s: %s", req.Method, req.URL, resp.Status, fmt.Sprintf(format, args...))
	}
	if req.Method == http.MethodOptions && resp.StatusCode == http.StatusNoContent {
		return // the answer to a preflight
	}

	template, method := s.path(req.URL.EscapedPath()), strings.ToLower(req.Method)
	if method == "head" {
		method = "get"
	}
	operation := s.get(s.doc, "paths", template, method)
	documented := s.get(operation, "responses", strconv.Itoa(resp.StatusCode))
	if operation == nil { // the problem comes from the router
		status, allow := http.StatusNotFound, []string(nil)
		switch {
		case resp.StatusCode == http.StatusMisdirectedRequest:
			status = resp.StatusCode
		case template != "":
			status, allow = http.StatusMethodNotAllowed, s.methods(template)
		}
		got := strings.FieldsFunc(resp.Header.Get("Allow"), func(r rune) bool { return r == ',' || r == ' ' })
		if slices.Sort(got); !slices.Equal(got, allow) {
			fail("Allow is %q, want %q", got, allow)
		}
		if resp.StatusCode == status {
			documented = s.get(s.doc, "components", "responses", "NotFound")
		}
	}
	if documented == nil {
		fail("this status is not documented")
		return
	}

	s.checkHeader(fail, documented, resp.Header, operation == nil)
	s.checkContent(fail, s.get(documented, "content"), req.Method, resp, respBody)

	if !strings.HasPrefix(template, "/api/") {
		return // other operations ignore what they do not use
	}
	broken := s.requestViolations(operation, req, reqBody)
	if resp.StatusCode/100 == 2 && len(broken) > 0 {
		fail("the request should not have succeeded: %s", strings.Join(broken, "; "))
	}
	// A schema cannot say that owners differ, or that a key was used before.
	beyond := bytes.Contains(respBody, []byte(`"#/user_id"`)) || bytes.Contains(respBody, []byte(`"Idempotency-Key"`))
	if resp.StatusCode == http.StatusUnprocessableEntity && len(broken) == 0 && !beyond && req.Method != http.MethodHead {
		fail("the request should not have been refused: it is as documented")
	}
}

// checkHeader checks the header of a response: nothing unknown, nothing missing,
// each value as documented.
func (s *spec) checkHeader(fail func(string, ...any), documented map[string]any, header http.Header, allow bool) {
	// Those that info.description promises everywhere, and those of HTTP.
	known := []string{"Connection", "Content-Length", "Content-Type", "Date", "Vary", "X-Content-Type-Options"}
	if allow {
		known = append(known, "Allow")
	}
	if got := header.Get("X-Content-Type-Options"); got != "nosniff" {
		fail("X-Content-Type-Options is %q", got)
	}
	for name := range s.get(documented, "headers") {
		values, object := header.Values(name), s.get(documented, "headers", name)
		if len(values) == 0 && object["required"] == true {
			fail("the header %s is missing", name)
		}
		for _, value := range values {
			for _, v := range s.validate(name, s.get(object, "schema"), s.parse(object, value), true) {
				fail("%s", v)
			}
		}
		known = append(known, http.CanonicalHeaderKey(name))
	}
	for name := range header {
		if !slices.Contains(known, name) && !strings.HasPrefix(name, "Access-Control-") {
			fail("the header %s is not documented", name)
		}
	}
}

// checkContent checks the media type and the body of a response, and a problem
// against the rest of the response.
func (s *spec) checkContent(fail func(string, ...any), content map[string]any, method string, resp *http.Response, body []byte) {
	mediaType, _, _ := mime.ParseMediaType(resp.Header.Get("Content-Type"))
	if content == nil && mediaType == "" && len(body) == 0 {
		return
	}
	if _, ok := content[mediaType]; !ok {
		fail("the media type %q is not documented: %s", mediaType, body)
		return
	}
	if method == http.MethodHead {
		return
	}
	var value any = string(body)
	if strings.HasSuffix(mediaType, "json") {
		var err error
		if value, err = decodeJSON(body); err != nil {
			fail("the body is no JSON: %v: %s", err, body)
			return
		}
	}
	for _, v := range s.validate("body", s.get(content, mediaType, "schema"), value, true) {
		fail("%s, in %s", v, body)
	}
	if problem, ok := value.(map[string]any); ok && mediaType == "application/problem+json" {
		for _, v := range problemViolations(problem, resp.StatusCode) {
			fail("%s", v)
		}
		if id := resp.Header.Get("X-Request-ID"); problem["request_id"] != id {
			fail("request_id is %q, X-Request-ID %q", problem["request_id"], id)
		}
	}
}

// problemViolations says where a problem does not fit its status.
func problemViolations(problem map[string]any, status int) (violations []string) {
	title := cmp.Or(http.StatusText(status), "Client Closed Request")
	if problem["status"] != json.Number(strconv.Itoa(status)) || problem["title"] != title {
		violations = append(violations, fmt.Sprintf("status %v and title %q with status %d",
			problem["status"], problem["title"], status))
	}
	if _, ok := problem["errors"]; ok != (status == http.StatusUnprocessableEntity) {
		violations = append(violations, fmt.Sprintf("errors present: %t with status %d", ok, status))
	}
	return violations
}

// requestViolations says where a request differs from what the document allows:
// in its query, its body and its Idempotency-Key.
func (s *spec) requestViolations(operation map[string]any, req *http.Request, body []byte) (violations []string) {
	query, err := url.ParseQuery(req.URL.RawQuery)
	if err != nil {
		violations = append(violations, err.Error())
	}
	known := s.parameters(operation, "query")
	for name, values := range query {
		parameter, ok := known[name]
		if !ok || len(values) != 1 || !utf8.ValidString(values[0]) {
			violations = append(violations, fmt.Sprintf("the parameter %s: %q", name, values))
			continue
		}
		violations = append(violations, s.validate(name, s.get(parameter, "schema"), s.parse(parameter, values[0]), false)...)
	}

	documented := s.get(operation, "requestBody")
	parameter, ok := s.parameters(operation, "header")["Idempotency-Key"]
	keys := req.Header.Values("Idempotency-Key")
	if len(keys) > 1 && ok || len(keys) > 0 && documented["required"] == false && len(body) == 0 {
		violations = append(violations, fmt.Sprintf("%d headers Idempotency-Key", len(keys)))
	}
	for _, key := range keys {
		violations = append(violations, s.validate("Idempotency-Key", s.get(parameter, "schema"), key, false)...)
	}

	if documented == nil || len(body) == 0 && documented["required"] != true {
		return violations
	}
	mediaType, _, _ := mime.ParseMediaType(req.Header.Get("Content-Type"))
	schema := s.get(documented, "content", mediaType, "schema")
	if schema == nil {
		return append(violations, fmt.Sprintf("the media type %q", mediaType))
	}
	value, err := decodeJSON(body)
	if err != nil {
		return append(violations, err.Error())
	}
	members, _ := value.(map[string]any)
	if title, ok := members["title"].(string); ok && strings.TrimSpace(title) == "" {
		violations = append(violations, "the title is blank") // its pattern knows only ASCII's white space
	}
	return append(violations, s.validate("body", schema, value, false)...)
}

// parse returns the value that a parameter or a header holds, by the type of its
// schema.
func (s *spec) parse(object map[string]any, text string) any {
	switch t := s.get(object, "schema")["type"]; {
	case t == "integer" && s.matches(`^-?[0-9]+$`, text):
		return json.Number(text)
	case t == "boolean" && (text == "true" || text == "false"):
		return text == "true"
	}
	return text
}

// validate says where a value breaks a schema, JSON Schema 2020-12 as far as the
// document needs it; a keyword that it does not know is a violation too. closed
// forbids members that the schema does not name, even where it would allow them:
// so the document can leave clients free to meet new members in a response, and
// the tests still find those that it forgot.
func (s *spec) validate(at string, schema map[string]any, value any, closed bool) (violations []string) {
	object, isObject := value.(map[string]any)
	array, _ := value.([]any)
	text, isText := value.(string)
	properties, _ := schema["properties"].(map[string]any)
	_, mentioned := schema["additionalProperties"]
	closed = closed && !mentioned
	kind, unit, size := measure(value)

	for _, keyword := range slices.Sorted(maps.Keys(schema)) {
		arg, ok := schema[keyword], true
		switch keyword {
		case "type":
			list, _ := arg.([]any)
			ok = arg == kind || slices.Contains(list, any(kind))
		case "const":
			ok = reflect.DeepEqual(value, arg)
		case "enum":
			ok = slices.Contains(arg.([]any), value)
		case "pattern":
			ok = !isText || s.matches(arg.(string), text)
		case "format":
			ok = s.hasFormat(value, arg.(string))
		case "min" + unit:
			ok = size >= float(arg)
		case "max" + unit:
			ok = size <= float(arg)
		case "items":
			for i, item := range array {
				violations = append(violations, s.validate(fmt.Sprintf("%s/%d", at, i), s.get(arg), item, closed)...)
			}
		case "required":
			for _, name := range arg.([]any) {
				if _, present := object[name.(string)]; isObject && !present {
					violations = append(violations, fmt.Sprintf("%s/%s is missing", at, name))
				}
			}
		case "properties":
			for _, name := range slices.Sorted(maps.Keys(object)) {
				if property, known := properties[name]; known {
					violations = append(violations, s.validate(at+"/"+name, s.get(property), object[name], closed)...)
				} else if closed {
					violations = append(violations, fmt.Sprintf("%s/%s is not documented", at, name))
				}
			}
		case "additionalProperties":
			for name := range object {
				_, known := properties[name]
				ok = ok && (known || arg == true)
			}
		case "description", "default": // say nothing of validity
		case "minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties", "minimum", "maximum": // of another type
		default:
			violations = append(violations, fmt.Sprintf("%s: the keyword %s is unknown to this validator", at, keyword))
		}
		if !ok {
			violations = append(violations, fmt.Sprintf("%s: %s %v does not hold", at, keyword, arg))
		}
	}
	return violations
}

// measure returns the type of a value, its size, and the end of the keywords that
// limit this size, such as Length of minLength and maxLength.
func measure(value any) (kind, unit string, size float64) {
	switch value := value.(type) {
	case bool:
		return "boolean", "", 0
	case string:
		return "string", "Length", float64(utf8.RuneCountInString(value))
	case json.Number:
		if size = float(value); size != math.Trunc(size) {
			return "number", "imum", size
		}
		return "integer", "imum", size
	case []any:
		return "array", "Items", float64(len(value))
	case map[string]any:
		return "object", "Properties", float64(len(value))
	}
	return "null", "", 0
}

// hasFormat reports whether a value has a format; one that is not of the format's
// type has it.
func (s *spec) hasFormat(value any, format string) bool {
	switch text, isText := value.(string); format {
	case "uuid":
		return !isText || s.matches(`(?i)^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`, text)
	case "date-time":
		_, err := time.Parse(time.RFC3339Nano, text)
		return !isText || err == nil
	case "int64":
		number, isNumber := value.(json.Number)
		_, err := number.Int64()
		return !isNumber || err == nil
	}
	return false
}

// matches reports whether a text matches a regular expression.
func (s *spec) matches(expression, text string) bool {
	compiled, ok := s.patterns.Load(expression)
	if !ok {
		compiled, _ = s.patterns.LoadOrStore(expression, regexp.MustCompile(expression))
	}
	return compiled.(*regexp.Regexp).MatchString(text)
}

func float(n any) float64 {
	f, _ := n.(json.Number).Float64()
	return f
}

// walk calls visit for each object of a document, with where it is. It passes
// over examples' values, which are data.
func walk(node any, at string, visit func(at string, object map[string]any)) {
	switch node := node.(type) {
	case map[string]any:
		visit(at, node)
		for _, name := range slices.Sorted(maps.Keys(node)) {
			if name != "value" && name != "example" {
				walk(node[name], at+"/"+name, visit)
			}
		}
	case []any:
		for i, item := range node {
			walk(item, fmt.Sprintf("%s/%d", at, i), visit)
		}
	}
}

// operations calls visit for each operation.
func (s *spec) operations(visit func(template, method string, operation map[string]any)) {
	for template, item := range s.get(s.doc, "paths") {
		for method, operation := range item.(map[string]any) {
			visit(template, method, operation.(map[string]any))
		}
	}
}

func TestOpenAPIRoutes(t *testing.T) {
	t.Parallel()
	s := loadSpec(t)
	var documented, served []string
	s.operations(func(template, method string, _ map[string]any) {
		documented = append(documented, strings.ToUpper(method)+" "+template)
	})
	for _, route := range (&Handler{}).routes() {
		served = append(served, strings.TrimSuffix(route.pattern, "{$}"))
	}
	slices.Sort(documented)
	if slices.Sort(served); !slices.Equal(documented, served) {
		t.Errorf("documented are %q, served %q", documented, served)
	}
}

func TestOpenAPIReferences(t *testing.T) {
	t.Parallel()
	s := loadSpec(t)
	used, names := map[string]bool{"#/components/securitySchemes/bearer": true}, make(map[string]bool)
	walk(s.doc, "#", func(at string, object map[string]any) {
		if ref, ok := object["$ref"].(string); ok {
			used[ref] = true
			if s.get(object) == nil {
				t.Errorf("%s: %s leads nowhere", at, ref)
			}
		}
		if id, ok := object["operationId"].(string); ok {
			if names[id] {
				t.Errorf("%s: %s is not the only one", at, id)
			}
			names[id] = true
		}
	})
	for kind := range s.get(s.doc, "components") {
		for name := range s.get(s.doc, "components", kind) {
			if ref := "#/components/" + kind + "/" + name; !used[ref] {
				t.Errorf("%s is not used", ref)
			}
		}
	}
	for _, id := range []string{"createTask", "listTasks", "getTask", "replaceTask", "patchTask", "completeTask", "deleteTask"} {
		if !names[id] {
			t.Errorf("there is no operation %s", id)
		}
	}
	for _, name := range []string{"Task", "NewTask", "TaskReplacement", "TaskPatch", "Completion", "Problem"} {
		if s.get(s.doc, "components", "schemas", name) == nil {
			t.Errorf("there is no schema %s", name)
		}
	}
}

// Each response header and each body has examples. A parameter has none, because
// tools fill in their forms from examples and send them.
func TestOpenAPIExamples(t *testing.T) {
	t.Parallel()
	s := loadSpec(t)
	walk(s.doc, "#", func(at string, object map[string]any) {
		schema := s.get(object["schema"]) // of a parameter, a header or content
		if schema == nil {
			return
		}
		var values []any
		if value, ok := object["example"]; ok {
			values = append(values, value)
		}
		for name := range s.get(object, "examples") {
			values = append(values, s.get(object, "examples", name)["value"])
		}
		if isParameter := object["in"] != nil; isParameter != (len(values) == 0) {
			t.Errorf("%s has %d examples", at, len(values))
		}
		for _, value := range values {
			for _, v := range s.validate(at, schema, value, true) {
				t.Errorf("example: %s", v)
			}
		}
	})
}

func TestOpenAPISchemas(t *testing.T) {
	t.Parallel()
	s := loadSpec(t)
	walk(s.doc, "#", func(at string, object map[string]any) {
		if pattern, ok := object["pattern"].(string); ok {
			s.matches(pattern, "") // panics unless it compiles
			if strings.ContainsFunc(pattern, func(r rune) bool { return r < ' ' || r > '~' }) {
				t.Errorf("%s: generated code may not compile with the pattern %q", at, pattern)
			}
		}
		// In a request body, a default makes the member required in generated clients.
		want := map[string]any{"#/components/parameters/sort/schema": "created_at", "#/components/parameters/limit/schema": json.Number(strconv.Itoa(defaultLimit))}[at]
		if object["default"] != want {
			t.Errorf("%s has the default %v, want %v", at, object["default"], want)
		}
	})

	if scheme := s.get(s.doc, "components", "securitySchemes", "bearer")["scheme"]; scheme != "bearer" {
		t.Errorf("the scheme of authentication is %v", scheme)
	}
	for name, most := range map[string]int{"Idempotency-Key": maxKey, "X-Request-ID": maxRequestID} {
		pattern := s.get(s.doc, "components", "parameters", name, "schema")["pattern"].(string)
		for text, want := range map[string]bool{"": false, "~!": true, strings.Repeat("a", most): true, strings.Repeat("a", most+1): false, "é": false, "a b": false} {
			if got := s.matches(pattern, text); got != want {
				t.Errorf("%s matches %q: %t", name, text, got)
			}
		}
	}
	s.operations(func(template, method string, operation map[string]any) {
		for mediaType := range s.get(operation, "requestBody", "content") {
			if s.get(operation, "requestBody", "content", mediaType, "schema")["additionalProperties"] != false {
				t.Errorf("%s %s: the request body allows unknown members", method, template)
			}
		}
	})

	// The title's pattern is exact for ASCII and allows everything beyond, for the
	// classes of regular expressions differ there.
	pattern := s.get(s.doc, "components", "schemas", "Task", "properties", "title")["pattern"].(string)
	for r := range rune(math.MaxUint16 + 1) {
		if got, want := s.matches(pattern, string(r)), r > unicode.MaxASCII || r != 0 && !unicode.IsSpace(r); got != want {
			t.Errorf("a title of only %U: allowed %t, want %t", r, got, want)
		}
	}
}

// TestOpenAPIOperations compares the statuses and headers of each operation with
// those that follow from what it takes and does.
func TestOpenAPIOperations(t *testing.T) {
	t.Parallel()
	s := loadSpec(t)
	optional := []any{map[string]any{}, map[string]any{"bearer": []any{}}}
	if !reflect.DeepEqual(s.doc["security"], optional) {
		t.Errorf("security is %v, want %v", s.doc["security"], optional)
	}
	special := map[string][]string{ // instead of 200
		"createTask": {"201"}, "getTask": {"200", "304"}, "deleteTask": {"204"}, "getReadiness": {"200", "499", "503"},
		"getOpenAPI": {"200", "304"}, "getDocs": {"200", "304"}, "getRoot": {"307"},
	}
	s.operations(func(template, method string, operation map[string]any) {
		id := operation["operationId"].(string)
		want := append(slices.Clone(special[id]), "421")
		if len(want) == 1 {
			want = append(want, "200")
		}
		if strings.HasPrefix(template, "/api/") {
			want = append(want, "400", "401", "403", "408", "413", "415", "422", "499", "500", "503") // of a body that is ignored, too
		}
		if secure := operation["security"] == nil; secure != strings.HasPrefix(template, "/api/") {
			t.Errorf("%s may need authentication: %t", id, secure)
		}
		if strings.Contains(template, "{id}") {
			want = append(want, "404", "412")
		}
		slices.Sort(want)
		responses := s.get(operation, "responses")
		if got := slices.Sorted(maps.Keys(responses)); !slices.Equal(got, want) {
			t.Errorf("%s has the statuses %v, want %v", id, got, want)
		}

		headers := s.parameters(operation, "header")
		for name, takes := range map[string]bool{
			"X-Request-ID": true, "Idempotency-Key": id == "createTask", "If-Match": responses["412"] != nil,
			"If-None-Match": responses["412"] != nil || responses["304"] != nil,
		} {
			if _, ok := headers[name]; ok != takes {
				t.Errorf("%s takes the header %s: %t", id, name, ok)
			}
		}

		for status := range responses {
			code, _ := strconv.Atoi(status)
			examples := s.get(responses, status, "content", "application/problem+json", "examples")
			if (examples != nil) != (code >= 400) {
				t.Errorf("%s %s: is a problem: %t", id, status, examples != nil)
			}
			for name := range examples {
				for _, v := range problemViolations(s.get(s.get(examples, name)["value"]), code) {
					t.Errorf("%s %s: example %s: %s", id, status, name, v)
				}
			}
		}
	})
}

// failures is a test that only counts its failures.
type failures struct {
	testing.TB
	messages []string
}

func (f *failures) Helper() {}
func (f *failures) Errorf(format string, args ...any) {
	f.messages = append(f.messages, fmt.Sprintf(format, args...))
}

func TestOpenAPICheck(t *testing.T) {
	t.Parallel()
	s := loadSpec(t)
	at := time.Date(2026, 2, 3, 8, 15, 30, 123456000, time.UTC)
	task := string(Task{ID: "019c2292-294b-774b-8e0f-5b3a1f6c9d42", Title: "Buy milk", Version: 1, CreatedAt: at, UpdatedAt: at}.appendJSON(nil))
	const problem = `{"type":"about:blank","title":"Not Found","status":404,"detail":"No.","request_id":"r1"}`
	const invalid = `{"type":"about:blank","title":"Unprocessable Entity","status":422,"detail":"No.","request_id":"r1",` +
		`"errors":[{"detail":"is wrong","pointer":"#/title"}]}`
	const ok, created, missing, page = "Cache-Control: no-cache\nETag: \"1\"\nContent-Type: application/json",
		"Cache-Control: no-cache\nETag: \"1\"\nContent-Type: application/json\nLocation: /api/tasks/019c2292-294b-774b-8e0f-5b3a1f6c9d42",
		"Cache-Control: no-store\nContent-Type: application/problem+json", "Cache-Control: no-cache\nContent-Type: application/json"
	replace := strings.NewReplacer

	for _, test := range []struct {
		name, request string // request: method, target and body
		status        int
		header        string
		body, want    string // want: in the failures; "": there are none
	}{
		{"a task", "GET /api/tasks/1", 200, ok, task, ""},
		{"its head", "HEAD /api/tasks/1", 200, ok, "", ""},
		{"with CORS", "GET /api/tasks/1", 200, ok + "\nVary: Origin\nAccess-Control-Allow-Origin: *", task, ""},
		{"not modified", "GET /api/tasks/1", 304, "Cache-Control: no-cache\nETag: \"1\"", "", ""},
		{"undocumented status", "GET /api/tasks/1", 202, ok, task, "this status is not documented"},
		{"undocumented header", "GET /api/tasks/1", 200, ok + "\nX-Debug: 1", task, "X-Debug"},
		{"header missing", "GET /api/tasks/1", 200, "ETag: \"1\"\nContent-Type: application/json", task, "Cache-Control is missing"},
		{"header wrong", "GET /api/tasks/1", 200, replace(`"1"`, `W/"1"`).Replace(ok), task, "ETag: pattern"},
		{"media type wrong", "GET /api/tasks/1", 200, replace("json", "xml").Replace(ok), task, "application/xml"},
		{"body missing", "GET /api/tasks/1", 200, ok, "", "no JSON"},
		{"member missing", "GET /api/tasks/1", 200, ok, replace(`"user_id":null,`, "").Replace(task), "body/user_id is missing"},
		{"member wrong", "GET /api/tasks/1", 200, ok, replace(`"version":1`, `"version":"1"`).Replace(task), "body/version: type"},
		{"member undocumented", "GET /api/tasks/1", 200, ok, replace(`"version":1`, `"version":1,"rank":1`).Replace(task), "body/rank is not"},
		{"item undocumented", "GET /api/tasks", 200, page, replace(`"version":1`, `"version":1,"rank":1`).Replace("[" + task + "]"), "body/0/rank is not"},
		{"type wrong", "GET /api/tasks", 200, page, task, "body: type array"},
		{"null", "GET /api/tasks/1", 200, ok, replace(`"Buy milk"`, "null").Replace(task), "body/title: type"},
		{"too small", "GET /api/tasks/1", 200, ok, replace(`"version":1`, `"version":0`).Replace(task), "minimum 1"},
		{"no integer", "GET /api/tasks/1", 200, ok, replace(`"version":1`, `"version":1.5`).Replace(task), "body/version: type"},
		{"number too large", "GET /api/tasks/1", 200, ok, replace(`"version":1`, `"version":9223372036854775808`).Replace(task), "format int64"},
		{"pattern broken", "GET /api/tasks/1", 200, ok, replace(`.123456Z`, `.123Z`).Replace(task), "body/created_at: pattern"},
		{"no date", "GET /api/tasks/1", 200, ok, replace(`02-03T`, `02-30T`).Replace(task), "format date-time"},
		{"too long", "GET /api/tasks/1", 200, ok, replace(`Buy milk`, strings.Repeat("😀", 201)).Replace(task), "maxLength 200"},
		{"long enough", "GET /api/tasks/1", 200, ok, replace(`Buy milk`, strings.Repeat("😀", 200)).Replace(task), ""},
		{"another constant", "GET /healthz", 200, replace("problem+", "").Replace(missing), `{"status":"OK"}`, "const ok"},
		{"no items", "POST /api/tasks {}", 422, missing, replace(`{"detail":"is wrong","pointer":"#/title"}`, "").Replace(invalid), "minItems 1"},
		{"too few properties", "POST /api/tasks {}", 422, missing, replace(`,"pointer":"#/title"`, "").Replace(invalid), "minProperties 2"},
		{"too many properties", "POST /api/tasks {}", 422, missing, replace(`,"pointer"`, `,"header":"a","pointer"`).Replace(invalid), "maxProperties 2"},
		{"content not documented", "DELETE /api/tasks/1", 204, ok, task, "media type"},
		{"no task", "GET /api/tasks/1", 404, missing, problem, ""},
		{"another problem's status", "GET /api/tasks/1", 404, missing, replace("404", "405").Replace(problem), "status 405"},
		{"another request's problem", "GET /api/tasks/1", 404, missing, replace("r1", "r2").Replace(problem), "request_id is"},
		{"no path", "GET /nowhere", 404, missing, problem, ""},
		{"no path, served", "GET /nowhere", 200, ok, task, "this status is not documented"},
		{"no method", "DELETE /api/tasks/", 405, missing + "\nAllow: GET, HEAD, POST",
			replace("404", "405", "Not Found", "Method Not Allowed").Replace(problem), ""},
		{"no host", "GET /nowhere", 421, missing, replace("404", "421", "Not Found", "Misdirected Request").Replace(problem), ""},
		{"client gone", "GET /api/tasks/1/", 499, missing, replace("404", "499", "Not Found", "Client Closed Request").Replace(problem), ""},
		{"no method, nor Allow", "DELETE /api/tasks", 405, missing, replace("404", "405", "Not Found", "Method Not Allowed").Replace(problem), "Allow is []"},
		{"created", `POST /api/tasks {"title":"Buy milk","version":"any"}`, 201, created, task, ""},
		{"created with a blank title", `POST /api/tasks {"title":"\u2003"}`, 201, created, task, "title is blank"},
		{"created from an unknown member", `POST /api/tasks {"title":"Buy milk","colour":1}`, 201, created, task, "additionalProperties"},
		{"created with an unknown parameter", `POST /api/tasks?colour=1 {"title":"Buy milk"}`, 201, created, task, "the parameter colour"},
		{"refused rightly", `POST /api/tasks {"title":" "}`, 422, missing, invalid, ""},
		{"refused wrongly", `POST /api/tasks {"title":"Buy milk"}`, 422, missing, invalid, "should not have been refused"},
		{"listed", "GET /api/tasks?limit=2&completed=true", 200, page, "[" + task + "]", ""},
		{"listed after no id", "GET /api/tasks?after=019c2292294b774b8e0f5b3a1f6c9d42", 200, page, "[]", "after: format uuid"},
		{"listed with a bad parameter", "GET /api/tasks?limit=0", 200, page, "[]", "limit: minimum"},
	} {
		parts := strings.SplitN(test.request+" ", " ", 3)
		body := strings.TrimSpace(parts[2])
		req := httptest.NewRequest(parts[0], parts[1], nil)
		req.Header.Set("Content-Type", "application/json")
		resp := &http.Response{StatusCode: test.status, Status: strconv.Itoa(test.status), Header: http.Header{}}
		resp.Header.Set("X-Request-ID", "r1")
		resp.Header.Set("X-Content-Type-Options", "nosniff")
		for line := range strings.SplitSeq(test.header, "\n") {
			name, value, _ := strings.Cut(line, ": ")
			resp.Header.Set(name, value)
		}
		f := &failures{TB: t}
		s.check(f, req, []byte(body), resp, []byte(test.body))
		if got := strings.Join(f.messages, "\n"); (got == "") != (test.want == "") || !strings.Contains(got, test.want) {
			t.Errorf("%s: %s, want %q", test.name, got, test.want)
		}
	}
}

package main

// json.go adds what encoding/json lacks: the strictness of RFC 8259 and I-JSON
// (RFC 7493) for what comes in, and writing without reflection for what goes
// out. encoding/json/v2 replaces it once Go 1.27 may be required.

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"time"
	"unicode/utf8"
)

// checkJSON returns an error unless text is one well-formed JSON text. Unlike
// encoding/json it refuses invalid UTF-8, half of a surrogate pair, and a name
// that is repeated within one object.
func checkJSON(text []byte) error {
	if !utf8.Valid(text) {
		return errors.New("invalid UTF-8")
	}
	if err := json.Unmarshal(text, new(json.RawMessage)); err != nil {
		return err
	}
	if slices.ContainsFunc(jsonEscape.FindAllSubmatchIndex(text, -1), func(m []int) bool { return m[2] >= 0 }) {
		return errors.New("a \\u escape that is half of a surrogate pair")
	}
	return checkNames(text)
}

// jsonEscape matches an escape in a JSON string. Its group is half of a
// surrogate pair.
var jsonEscape = regexp.MustCompile(`\\(?:u[dD][89abAB]..\\u[dD][c-fC-F]..|(u[dD][89a-fA-F]..)|.)`)

// checkNames returns an error if an object in a valid JSON text has the same
// name twice. A [json.Decoder] would take 20 times as long.
func checkNames(text []byte) error {
	var scopes []map[string]bool // the names in the objects around text[i]; none in an array
	for i := 0; i < len(text); i++ {
		switch text[i] {
		case '{', '[':
			scopes = append(scopes, map[string]bool{})
		case '}', ']':
			scopes = scopes[:len(scopes)-1]
		case '"':
			begin := i
			for i++; text[i] != '"'; i++ {
				if text[i] == '\\' {
					i++
				}
			}
			if rest := bytes.TrimLeft(text[i+1:], " \t\r\n"); !bytes.HasPrefix(rest, []byte(":")) {
				continue // a value
			}
			var name string
			_ = json.Unmarshal(text[begin:i+1], &name) // cannot fail
			names := scopes[len(scopes)-1]
			if names[name] {
				return fmt.Errorf("the member %q is repeated", name)
			}
			names[name] = true
		}
	}
	return nil
}

// appendString appends a string, which must be valid UTF-8; nil becomes null.
func appendString(b []byte, s *string) []byte {
	if s == nil {
		return append(b, "null"...)
	}
	b = append(b, '"')
	rest := *s
	for i := 0; i < len(rest); i++ {
		if c := rest[i]; c < ' ' || c == '"' || c == '\\' {
			b = fmt.Appendf(append(b, rest[:i]...), `\u%04x`, c)
			rest, i = rest[i+1:], -1
		}
	}
	return append(append(b, rest...), '"')
}

// appendTime appends a time in UTC, always with six fractional digits, so that
// strings sort as times do. AppendFormat is slow for other formats than RFC3339.
func appendTime(b []byte, t time.Time) []byte {
	b = t.UTC().AppendFormat(append(b, '"'), time.RFC3339)
	point := len(b) - len("Z")
	b = strconv.AppendInt(b[:point], 1e6+int64(t.Nanosecond()/1e3), 10) // seven digits
	b[point] = '.'
	return append(b, `Z"`...)
}

package main

// json.go adds what encoding/json lacks: the strictness of RFC 8259 and I-JSON
// (RFC 7493) for what comes in, and writing without reflection for what goes
// out. encoding/json/v2 replaces it once Go 1.27 may be required.

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"time"
	"unicode"
	"unicode/utf16"
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
	if hasHalfPair(text) {
		return errors.New("a \\u escape that is half of a surrogate pair")
	}
	return checkNames(text)
}

// hasHalfPair reports whether a valid JSON text has an escape that is half of a
// surrogate pair. Backslashes occur in strings only.
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

// escaped returns the UTF-16 code unit of the \uXXXX that text begins with, or
// 0 if it begins with something else.
func escaped(text []byte) rune {
	if len(text) < 6 || text[0] != '\\' || text[1] != 'u' {
		return 0
	}
	n, _ := strconv.ParseUint(string(text[2:6]), 16, 16)
	return rune(n)
}

// checkNames returns an error if an object in a valid JSON text has the same
// name twice.
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
				return fmt.Errorf("the member %q is repeated", name)
			}
			names[name] = true
		}
	}
	return nil
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

// appendTime appends a time in UTC, always with six fractional digits, so that
// strings sort as times do.
func appendTime(b []byte, t time.Time) []byte {
	return t.UTC().AppendFormat(b, `"2006-01-02T15:04:05.000000Z"`)
}

package app

import (
	"context"
	"crypto/ed25519"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"testing"
	"time"
)

// The server of README's serve, with README's bearer, serves until its context ends.
func TestApp(t *testing.T) {
	public, private, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	keys := func(id string) (ed25519.PublicKey, error) {
		if id != "mine" {
			return nil, errors.New("unknown key")
		}
		return public, nil
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	served := make(chan error, 1)
	go func() { served <- serve(ctx, l, os.Getenv("TASKS_TEST_APP"), keys) }()
	encode := base64.RawURLEncoding.EncodeToString
	token := func(alg, kid, sub string, exp time.Time) string {
		signed := encode(fmt.Appendf(nil, `{"alg":%q,"kid":%q}`, alg, kid)) + "." + encode(fmt.Appendf(nil, `{"sub":%q,"exp":%d}`, sub, exp.Unix()))
		return signed + "." + encode(ed25519.Sign(private, []byte(signed)))
	}
	soon := time.Now().Add(time.Hour)
	good := token("EdDSA", "mine", "alice", soon)
	for _, tt := range []struct {
		name, authorization string
		want                int
	}{
		{"good", "Bearer " + good, 200},
		{"scheme in lower case", "bearer " + good, 200},
		{"none", "", 401},
		{"another scheme", "Basic " + good, 401},
		{"no token", "Bearer a.b", 401},
		{"no base64", "Bearer !.!.!", 401},
		{"no JSON", "Bearer a.b.c", 401},
		{"not signed", "Bearer " + good[:len(good)-86], 401},
		{"of another user", "Bearer " + token("EdDSA", "mine", "bob", soon)[:len(good)-88] + good[len(good)-88:], 401},
		{"another algorithm", "Bearer " + token("none", "mine", "alice", soon), 401},
		{"unknown key", "Bearer " + token("EdDSA", "another", "alice", soon), 401},
		{"expired", "Bearer " + token("EdDSA", "mine", "alice", time.Now().Add(-time.Second)), 401},
		{"nobody", "Bearer " + token("EdDSA", "mine", "", soon), 403},
	} {
		req, err := http.NewRequest("GET", "http://"+l.Addr().String()+"/api/tasks", nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Authorization", tt.authorization)
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err, <-served)
		}
		resp.Body.Close()
		if resp.StatusCode != tt.want {
			t.Errorf("%s: %s, want %d", tt.name, resp.Status, tt.want)
		}
	}
	stop()
	if err := <-served; err != nil {
		t.Error(err)
	}
}

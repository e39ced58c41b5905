package main

// localdb_test.go starts, crashes and crowds private servers, which are real.

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

func TestLocalDBFirstAndSecondStart(t *testing.T) {
	t.Parallel()
	dir := newLocalDir(t)
	unfinished := filepath.Join(dir, "initdb-KILLED")
	if err := os.MkdirAll(filepath.Join(unfinished, "base"), 0o700); err != nil {
		t.Fatal(err)
	}
	db := startLocal(t, dir)
	if _, err := os.Stat(unfinished); err == nil {
		t.Errorf("%s is still there", unfinished)
	}
	for setting, want := range map[string]string{
		"listen_addresses": "",
		"fsync":            "on",
		"server_encoding":  "UTF8",
		"data_directory":   filepath.Join(dir, "data"),
	} {
		if got := queryLocal(t, db.URL, "SHOW "+setting); got != want {
			t.Errorf("%s is %q, want %q", setting, got, want)
		}
	}
	sockets := db.sockets
	for _, private := range []string{sockets, filepath.Join(dir, "data")} {
		if info, err := os.Stat(private); err != nil || info.Mode().Perm() != 0o700 {
			t.Errorf("%s: %v, %v, want mode 0700", private, info, err)
		}
	}
	execSQL(t, db.URL, "CREATE TABLE kept AS SELECT 'what was stored' AS what")
	if err := db.Stop(); err != nil {
		t.Fatal(err)
	}
	if left, err := os.Stat(sockets); err == nil {
		t.Errorf("%s is still there", left.Name())
	}

	db = startLocal(t, dir)
	if got := queryLocal(t, db.URL, "SELECT what FROM kept"); got != "what was stored" {
		t.Errorf("after a restart there is %q", got)
	}
}

// A crash of the service is in TestPrivatePostgreSQL.
func TestLocalDBServerCrash(t *testing.T) {
	t.Parallel()
	dir := newLocalDir(t)
	db := startLocal(t, dir, "fsync=off")
	crashed := db.postmaster()
	if want := "host=" + crashed.sockets + " port=5432 "; !strings.HasPrefix(db.URL, want) {
		t.Errorf("URL is %q, want %q first", db.URL, want)
	}
	execSQL(t, db.URL, "CREATE TABLE kept AS SELECT 'what was stored' AS what")

	killServer(t, crashed)
	next := startLocal(t, dir, "fsync=off")
	if got := queryLocal(t, next.URL, "SELECT what FROM kept"); got != "what was stored" {
		t.Errorf("after a crash of the server there is %q", got)
	}
	if err := db.Stop(); err != nil {
		t.Errorf("stopping the server that crashed: %v", err)
	}
	if _, err := os.Stat(crashed.sockets); err == nil {
		t.Errorf("%s is still there", crashed.sockets)
	}
	queryLocal(t, next.URL, "SELECT 'not stopped'")
}

func TestLocalDBSeveralInstances(t *testing.T) {
	t.Parallel()
	dir := newLocalDir(t)
	winner, loser := start(t, filepath.Dir(dir), nil), start(t, filepath.Dir(dir), nil)
	select {
	case <-winner.ended:
		winner, loser = loser, winner
	case <-loser.ended:
	}
	refusal := fmt.Sprintf("tasks (process %d) is using it", winner.Process.Pid)
	if said := loser.exit(1); !strings.Contains(said, refusal) {
		t.Errorf("the loser of two at once says %q, want %q in it", said, refusal)
	}
	winner.post("not stopped")
	third, err := startLocalDB(t.Context(), dir, os.Getenv("PG_BIN"))
	if err == nil {
		third.Stop()
	}
	if err == nil || !strings.Contains(err.Error(), refusal) {
		t.Errorf("a third gets the error %v, want %q in it", err, refusal)
	}
	winner.post("not stopped")

	// One that comes while the winner stops is refused or waits; in no case it
	// gets the server that is going away.
	winner.stop()
	last, err := startLocalDB(t.Context(), dir, os.Getenv("PG_BIN"), "fsync=off")
	winner.exit(0)
	switch {
	case err == nil:
		queryLocal(t, last.URL, "SELECT 'not stopped'")
		if err := last.Stop(); err != nil {
			t.Error(err)
		}
	case !strings.Contains(err.Error(), refusal):
		t.Errorf("starting while the winner stops: %v", err)
	}
}

func TestLocalDBFailedStart(t *testing.T) {
	t.Parallel()
	dir := newLocalDir(t)
	db, err := startLocalDB(t.Context(), dir, os.Getenv("PG_BIN"), "fsync=off", "hba_file=/nowhere")
	if err == nil {
		db.Stop()
		t.Fatal("it starts")
	}
	for _, want := range []string{dir, "listening on Unix socket", `"/nowhere": No such file`} {
		if strings.Count(err.Error(), want) != 1 {
			t.Errorf("error is %q, want %q in it, once", err, want)
		}
	}
	startLocal(t, dir, "fsync=off")
}

func TestLocalDBRefusals(t *testing.T) {
	t.Parallel()
	old := t.TempDir()
	if err := os.WriteFile(filepath.Join(old, "postgres"), []byte("#!/bin/sh\necho 'postgres (PostgreSQL) 13.9'\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		name  string
		setup func(t *testing.T, dir string)
		bin   string
		want  []string
	}{
		{"no programs", func(*testing.T, string) {}, t.TempDir(), []string{
			"apt-get install postgresql", "dnf install", "brew install", "PG_BIN", "DATABASE_URL",
		}},
		{"old programs", func(*testing.T, string) {}, old, []string{"no PostgreSQL 14 or later found in " + old}},
		{"data of another version", func(t *testing.T, dir string) {
			err := os.MkdirAll(filepath.Join(dir, "data"), 0o700)
			if err := cmp.Or(err, os.WriteFile(filepath.Join(dir, "data", "PG_VERSION"), []byte("12\n"), 0o600)); err != nil {
				t.Fatal(err)
			}
		}, "", []string{"of version 12", "PG_BIN", "pg_upgrade", "move it away"}},
		{"directory out of reach", func(t *testing.T, dir string) {
			mode := os.FileMode(0o500) // read-only
			if os.Geteuid() == 0 {
				mode = 0o700 // only root may pass through it
			}
			if err := os.Chmod(filepath.Dir(dir), mode); err != nil {
				t.Fatal(err)
			}
		}, "", []string{"runs as the user postgres", "must be able to reach it and write to it", "permission denied", "start in another directory", "DATABASE_URL"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			dir := newLocalDir(t)
			test.setup(t, dir)
			before := files(t, dir)
			db, err := startLocalDB(t.Context(), dir, test.bin)
			if err == nil {
				db.Stop()
				t.Fatal("it starts")
			}
			for _, want := range append(test.want, dir) {
				if !strings.Contains(strings.ToLower(err.Error()), strings.ToLower(want)) {
					t.Errorf("error is %q, want %q in it", err, want)
				}
			}
			if after := files(t, dir); !slices.Equal(after, before) {
				t.Errorf("there is now %v, want %v", after, before)
			}
		})
	}
}

func TestLocalDBInterrupted(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name string
		when string   // this file is there
		left []string // in the directory
	}{
		{"making the cluster", "initdb-*/PG_VERSION", []string{"server.log"}},
		{"starting the server", "data/postmaster.pid", []string{"data", "server.log"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			dir := newLocalDir(t)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			go func() {
				for ctx.Err() == nil {
					if found, _ := filepath.Glob(filepath.Join(dir, test.when)); found != nil {
						cancel()
					}
					time.Sleep(time.Millisecond)
				}
			}()
			db, err := startLocalDB(ctx, dir, os.Getenv("PG_BIN"), "fsync=off")
			if err == nil {
				db.Stop()
			}
			if !errors.Is(err, context.Canceled) {
				t.Errorf("error is %v, want that of the context", err)
			}
			if left := files(t, dir); !slices.Equal(left, test.left) {
				t.Errorf("there is %v left, want %v", left, test.left)
			}
		})
	}
}

// newLocalDir returns the path of a directory for a private server, yet to be
// made, in one that is the test's own. At the end of the test no server must be
// left of it.
func newLocalDir(t *testing.T) string {
	t.Helper()
	temp := t.TempDir()
	dir := filepath.Join(temp, "`a` \"$b", localDir)
	// PostgreSQL may have to run as another user.
	if err := errors.Join(os.Mkdir(filepath.Dir(dir), 0o755), os.Chmod(filepath.Dir(temp), 0o711)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if left := (&localDB{dir: dir}).postmaster(); left.pid != "" {
			t.Errorf("process %s is left running", left.pid)
			killServer(t, left)
		}
		log, _ := os.ReadFile(filepath.Join(dir, "server.log"))
		for _, sockets := range regexp.MustCompile(localSockets+`\w+`).FindAllString(string(log), -1) {
			if _, err := os.Stat(sockets); err == nil {
				t.Errorf("%s is left", sockets)
			}
		}
	})
	return dir
}

func killServer(t *testing.T, server postmaster) {
	t.Helper()
	pid, err := strconv.Atoi(server.pid)
	if err == nil {
		err = syscall.Kill(pid, syscall.SIGKILL)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// startLocal returns a private server that is stopped when the test ends.
func startLocal(t *testing.T, dir string, opts ...string) *localDB {
	t.Helper()
	db, err := startLocalDB(t.Context(), dir, os.Getenv("PG_BIN"), opts...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := db.Stop(); err != nil {
			t.Error(err)
		}
	})
	return db
}

// queryLocal returns the one value that a query yields.
func queryLocal(t *testing.T, url, query string) (value string) {
	t.Helper()
	pool := open(t, url)
	defer pool.Close()
	if err := pool.QueryRow(query).Scan(&value); err != nil {
		t.Fatalf("%s: %v", query, err)
	}
	return value
}

// files returns the names of what is in a directory, none if it does not exist.
func files(t *testing.T, dir string) (names []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	for _, entry := range entries {
		names = append(names, entry.Name())
	}
	return names
}

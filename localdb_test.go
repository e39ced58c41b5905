package main

// localdb_test.go starts, crashes and crowds private servers, which are real.

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// localProcessDir is the environment variable by which [startLocalProcess] tells
// another process of this program its directory.
const localProcessDir = "TASKS_TEST_LOCALDB"

func TestLocalDBFirstAndSecondStart(t *testing.T) {
	t.Parallel()
	dir := newLocalDir(t)
	unfinished := filepath.Join(dir, "initdb-KILLED")
	if err := os.MkdirAll(filepath.Join(unfinished, "base"), 0o700); err != nil {
		t.Fatal(err)
	}
	// A server that listened on TCP could not start with a port that is taken.
	taken, err := net.Listen("tcp", "localhost:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	_, port, _ := net.SplitHostPort(taken.Addr().String())

	db := startLocal(t, dir, "port="+port)
	if _, err := os.Stat(unfinished); err == nil {
		t.Errorf("%s is still there", unfinished)
	}
	for setting, want := range map[string]string{
		"listen_addresses": "",
		"fsync":            "on",
		"server_encoding":  "UTF8",
		"data_directory":   filepath.Join(dir, "data"),
	} {
		if got := queryLocal(t, db, "SHOW "+setting); got != want {
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
	for range 2 { // the second does nothing
		if err := db.Stop(); err != nil {
			t.Fatal(err)
		}
	}
	if left, err := os.Stat(sockets); err == nil {
		t.Errorf("%s is still there", left.Name())
	}

	db = startLocal(t, dir)
	if got := queryLocal(t, db, "SELECT what FROM kept"); got != "what was stored" {
		t.Errorf("after a restart there is %q", got)
	}
}

func TestLocalDBAfterCrashes(t *testing.T) {
	t.Parallel()
	dir := newLocalDir(t)
	service := startLocalProcess(t, dir)
	if !service.started() {
		t.Fatal(service.said)
	}
	found := (&localDB{dir: dir}).postmaster()
	service.Process.Kill()
	service.end()

	db := startLocal(t, dir, "fsync=off")
	if db.postmaster() != found {
		t.Errorf("after a crash of the service the server is %+v, want %+v, which was running", db.postmaster(), found)
	}
	if want := "host=" + found.sockets + " port=5432 "; !strings.HasPrefix(db.URL, want) {
		t.Errorf("URL is %q, want %q first", db.URL, want)
	}
	execSQL(t, db.URL, "CREATE TABLE kept AS SELECT 'what was stored' AS what")

	killServer(t, found)
	next := startLocal(t, dir, "fsync=off")
	if got := queryLocal(t, next, "SELECT what FROM kept"); got != "what was stored" {
		t.Errorf("after a crash of the server there is %q", got)
	}
	if err := db.Stop(); err != nil {
		t.Errorf("stopping the server that crashed: %v", err)
	}
	if _, err := os.Stat(found.sockets); err == nil {
		t.Errorf("%s is still there", found.sockets)
	}
	queryLocal(t, next, "SELECT 'not stopped'")
}

func TestLocalDBSeveralInstances(t *testing.T) {
	t.Parallel()
	dir := newLocalDir(t)
	winner, loser := startLocalProcess(t, dir), startLocalProcess(t, dir)
	if !winner.started() {
		winner, loser = loser, winner
	}
	if !winner.started() || loser.started() {
		t.Fatalf("of two at once one says %q, the other %q", winner.said, loser.said)
	}
	refusal := fmt.Sprintf("tasks (process %d) is using it", winner.Process.Pid)
	if !strings.Contains(loser.said, refusal) {
		t.Errorf("the loser of two at once says %q, want %q in it", loser.said, refusal)
	}
	if err := loser.end(); err != nil {
		t.Error(err)
	}
	third, err := startLocalDB(t.Context(), dir, os.Getenv("PG_BIN"))
	if err == nil {
		third.Stop()
	}
	if err == nil || !strings.Contains(err.Error(), refusal) {
		t.Errorf("a third gets the error %v, want %q in it", err, refusal)
	}
	_, url, _ := strings.Cut(winner.said, "started ")
	queryLocal(t, &localDB{URL: url}, "SELECT 'not stopped'")

	// One that comes while the winner stops is refused or waits; in no case it
	// gets the server that is going away.
	winner.stdin.Close()
	last, err := startLocalDB(t.Context(), dir, os.Getenv("PG_BIN"), "fsync=off")
	if err := winner.end(); err != nil {
		t.Errorf("the winner stops: %v", err)
	}
	switch {
	case err == nil:
		queryLocal(t, last, "SELECT 'not stopped'")
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
	tests := []struct {
		name  string
		setup func(t *testing.T, dir string)
		bin   string
		want  []string
	}{
		{"no programs", func(*testing.T, string) {}, t.TempDir(), []string{
			"apt-get install postgresql", "dnf install", "brew install", "PG_BIN", "DATABASE_URL",
		}},
		{"data of another version", func(t *testing.T, dir string) {
			if err := os.MkdirAll(filepath.Join(dir, "data"), 0o700); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(dir, "data", "PG_VERSION"), []byte("12\n"), 0o600); err != nil {
				t.Fatal(err)
			}
		}, "", []string{"of version 12", "not found (only those of 1", "PG_BIN", "pg_upgrade", "move it away"}},
		{"directory out of reach", func(t *testing.T, dir string) {
			mode := os.FileMode(0o500) // nobody may write in it
			if os.Geteuid() == 0 {
				mode = 0o700 // only root may pass through it
			}
			if err := os.Chmod(filepath.Dir(dir), mode); err != nil {
				t.Fatal(err)
			}
		}, "", []string{"runs as the user postgres", "must be able to reach it and write to it", "permission denied", "start in another directory", "DATABASE_URL"}},
	}
	for _, test := range tests {
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
	tests := []struct {
		name string
		when string   // this file is there
		left []string // in the directory
	}{
		{"making the cluster", "initdb-*/PG_VERSION", []string{"server.log"}},
		{"starting the server", "data/postmaster.pid", []string{"data", "server.log"}},
	}
	for _, test := range tests {
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

// TestLocalDBProcess is no test, but what [startLocalProcess] runs.
func TestLocalDBProcess(t *testing.T) {
	dir := os.Getenv(localProcessDir)
	if dir == "" {
		return
	}
	db, err := startLocalDB(t.Context(), dir, os.Getenv("PG_BIN"), "fsync=off")
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println("started", db.URL)
	io.Copy(io.Discard, os.Stdin)
	if err := db.Stop(); err != nil {
		t.Error(err)
	}
}

// newLocalDir returns the path of a directory for a private server, yet to be
// made. At the end of the test no server must be left of it.
func newLocalDir(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "local")
	// PostgreSQL may have to run as another user.
	if err := os.Chmod(filepath.Dir(filepath.Dir(dir)), 0o711); err != nil {
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
	if err != nil {
		t.Fatal(err)
	}
	process, err := os.FindProcess(pid)
	if err != nil {
		t.Fatal(err)
	}
	if err := process.Kill(); err != nil {
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
func queryLocal(t *testing.T, db *localDB, query string) (value string) {
	t.Helper()
	pool, err := OpenDB(db.URL)
	if err != nil {
		t.Fatal(err)
	}
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

// A localProcess is another process, which starts the server in a directory.
type localProcess struct {
	*exec.Cmd
	stdin  io.Closer // when it is closed, the process stops its server and ends
	stdout *bufio.Reader
	said   string // in its first line: "started" and the URL, or an error
}

// startLocalProcess returns a process that has ended when the test has.
func startLocalProcess(t *testing.T, dir string) *localProcess {
	t.Helper()
	p := &localProcess{Cmd: exec.Command(os.Args[0], "-test.run=^TestLocalDBProcess$")}
	// The race detector would have each process end a second late.
	p.Env = append(os.Environ(), localProcessDir+"="+dir, "GORACE=atexit_sleep_ms=0")
	p.Stderr = os.Stderr
	stdin, err := p.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := p.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Start(); err != nil {
		t.Fatal(err)
	}
	p.stdin, p.stdout = stdin, bufio.NewReader(stdout)
	t.Cleanup(func() { p.end() }) // if the test has not done so
	return p
}

// started waits until the process has started the server, or has failed to, and
// reports which.
func (p *localProcess) started() bool {
	if p.said == "" {
		p.said, _ = p.stdout.ReadString('\n')
	}
	return strings.HasPrefix(p.said, "started ")
}

// end has the process stop its server, and returns an error if that fails.
func (p *localProcess) end() error {
	p.stdin.Close()
	rest, _ := io.ReadAll(p.stdout)
	if err := p.Wait(); err != nil {
		return fmt.Errorf("%w: %s", err, rest)
	}
	return nil
}

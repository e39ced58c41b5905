package main

// localdb.go runs a PostgreSQL server that belongs to this service alone, from
// the programs installed on the machine: for a quick start, and for the tests.

import (
	"bytes"
	"context"
	"crypto/rand"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"
)

const (
	localOldest  = 14            // PostgreSQL's major version
	localTimeout = time.Minute   // of a start, recovery after a crash included, and of a stop
	localAccount = "postgres"    // runs PostgreSQL for root, whom it refuses
	localSockets = "/tmp/tasks-" // not in $TMPDIR: a socket's path has at most 103 bytes, and localAccount must reach it
)

// A localDB is a private PostgreSQL server, in use by this process only. The
// database cluster is the directory data in its own, server.log what it logs.
// It listens on a Unix socket that nobody but its account, and root, can reach.
//
// The server is a process of its own. It outlives a service that is killed; the
// next start finds it running.
type localDB struct {
	URL string // of its database postgres, for OpenDB

	dir     string  // absolute
	bin     string  // where initdb, pg_ctl and postgres are
	sockets string  // directory of the socket
	lock    *sql.DB // one connection, whose session has the lock; nil once stopped
}

// startLocalDB starts the server whose files are in dir, or takes over the one
// that runs there; it makes the directory and the cluster if they are missing.
// The programs are those in the directory bin or, when that is empty, the first
// found that fit the cluster. The opts are settings of the server, such as
// "fsync=off"; a server found running keeps its own.
//
// When another process uses the server, the error says which. An error leaves
// nothing half done, and is ctx.Err() when ctx ended the start.
func startLocalDB(ctx context.Context, dir, bin string, opts ...string) (*localDB, error) {
	if runtime.GOOS == "windows" {
		return nil, errors.New("the private PostgreSQL needs a Unix system: set DATABASE_URL")
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	db := &localDB{dir: dir}
	for _, step := range []func() error{
		func() error { return db.findPrograms(ctx, bin) },
		func() error { return db.makeDir(ctx) },
		func() error { return db.makeCluster(ctx, slices.Contains(opts, "fsync=off")) },
		func() error { return db.open(ctx, opts) },
	} {
		if err := step(); err != nil {
			return nil, fmt.Errorf("private PostgreSQL in %s: %w", dir, err)
		}
	}
	return db, nil
}

// Stop ends the server, unless another process has taken it over after a crash,
// and waits until it has gone. Only the first call does anything.
func (db *localDB) Stop() (err error) {
	if db.lock == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), localTimeout)
	defer cancel()
	holder, _ := tryLock(ctx, db.lock)
	db.lock.Close()
	db.lock = nil
	if holder != "" {
		return nil
	}
	if db.server().sockets == db.sockets {
		err = db.run(ctx, db.bin+"/pg_ctl", "stop", "-w", "-m", "fast", "-D", "data")
	}
	// Not every directory that a file names is to be removed.
	if ok, _ := filepath.Match(localSockets+"*", db.sockets); ok {
		err = errors.Join(err, os.RemoveAll(db.sockets))
	}
	if err != nil {
		return fmt.Errorf("stopping the private PostgreSQL in %s: %w", db.dir, err)
	}
	return nil
}

// findPrograms sets db.bin to bin or, when that is empty, to the first usual
// place where PostgreSQL is of the cluster's version, if there is a cluster.
func (db *localDB) findPrograms(ctx context.Context, bin string) error {
	dirs := []string{bin}
	if bin == "" {
		dirs = programDirs()
	}
	want, found := db.version(), ""
	for _, dir := range dirs {
		var major int
		out, _ := exec.CommandContext(ctx, filepath.Join(dir, "postgres"), "--version").Output()
		fmt.Sscanf(string(out), "postgres (PostgreSQL) %d", &major)
		if major < localOldest {
			continue
		}
		if want == "" || want == strconv.Itoa(major) {
			db.bin = dir
			return nil
		}
		found += fmt.Sprintf(" %d (%s)", major, dir)
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if found == "" {
		return fmt.Errorf("no programs of PostgreSQL %d or later found (looked in %s): install them (make run does; or apt-get install postgresql, "+
			"dnf install postgresql-server, brew install postgresql), set PG_BIN to their directory, or set DATABASE_URL", localOldest, strings.Join(dirs, ", "))
	}
	return fmt.Errorf("its data are of version %s, the programs found of%s: set PG_BIN to the directory of programs of version %[1]s, "+
		"or convert the data with pg_upgrade or pg_dump, or move them away to begin anew", want, found)
}

// programDirs returns the directories where PostgreSQL's programs may be, PATH's
// first, then the newest of each kind of package.
func programDirs() []string {
	var dirs []string
	if file, err := exec.LookPath("pg_ctl"); err == nil {
		dirs = append(dirs, filepath.Dir(file))
	}
	for _, places := range []string{
		"/usr/lib/postgresql/*/bin", // Debian
		"/usr/pgsql-*/bin",          // PostgreSQL's packages for Red Hat
		"/opt/homebrew/opt/postgresql*/bin",
		"/usr/local/opt/postgresql*/bin",
		"/usr/local/pgsql/bin",
		"/Applications/Postgres.app/Contents/Versions/*/bin",
	} {
		found, _ := filepath.Glob(places)
		slices.Reverse(found)
		dirs = append(dirs, found...)
	}
	return dirs
}

// makeDir makes the directory and makes sure that the programs can write there.
func (db *localDB) makeDir(ctx context.Context) error {
	const hint = "start in another directory, or as another user, or set DATABASE_URL"
	if err := os.MkdirAll(db.dir, 0o700); err != nil {
		return fmt.Errorf("%w: %s", err, hint)
	}
	who := "this user"
	if os.Geteuid() == 0 {
		who = "the user " + localAccount + ", who runs PostgreSQL because it refuses root,"
		account, err := user.Lookup(localAccount)
		if err != nil {
			return fmt.Errorf("%s is missing (%w): add it, %s", who, err, hint)
		}
		if uid, err := strconv.Atoi(account.Uid); err == nil && db.version() == "" {
			os.Lchown(db.dir, uid, -1)
		}
	}
	if err := db.run(ctx, "test", "-w", db.dir); err != nil {
		return fmt.Errorf("%s cannot reach and write this directory (%w): %s", who, err, hint)
	}
	return nil
}

// makeCluster makes the database cluster unless there is one. It is made beside
// its place: there it is whole or not at all, and the first of several wins.
func (db *localDB) makeCluster(ctx context.Context, nosync bool) error {
	if db.version() != "" {
		return nil
	}
	// Whoever reaches the socket is trusted; no order of text is asked for.
	args := []string{"-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-locale"}
	if nosync {
		args = append(args, "--no-sync")
	}
	name := "initdb-" + rand.Text()
	defer os.RemoveAll(filepath.Join(db.dir, name))
	err := db.run(ctx, db.bin+"/initdb", append(args, "-D", name)...)
	if err == nil {
		err = os.Rename(filepath.Join(db.dir, name), filepath.Join(db.dir, "data"))
	}
	if err != nil && db.version() == "" {
		return fmt.Errorf("making the database, which takes 60 MB of disk: %w", err)
	}
	return nil
}

// version returns the major version of the database cluster, "" if there is none.
func (db *localDB) version() string {
	text, _ := os.ReadFile(filepath.Join(db.dir, "data", "PG_VERSION"))
	return strings.TrimSpace(string(text))
}

// open claims the server, which it starts if none is running. While another
// process starts or stops it, open waits for what comes of that.
func (db *localDB) open(ctx context.Context, opts []string) error {
	sockets := localSockets + rand.Text()[:10]
	if err := db.run(ctx, "mkdir", "-m", "700", sockets); err != nil {
		return err
	}
	defer func() {
		if db.server().sockets != sockets {
			os.RemoveAll(sockets)
		}
	}()
	failed := false
	for deadline := time.Now().Add(localTimeout); ; time.Sleep(20 * time.Millisecond) {
		// Even after an interrupt: a server of ours that has come up all the
		// same is to be claimed, and then stopped.
		holder, err := db.claim(context.WithoutCancel(ctx))
		switch {
		case holder != "":
			return fmt.Errorf("it is in use by %s: stop that, start in another directory, or set DATABASE_URL", holder)
		case err == nil && ctx.Err() != nil:
			return errors.Join(ctx.Err(), db.Stop())
		case err == nil:
			return nil
		case ctx.Err() != nil && db.server().sockets != sockets:
			return ctx.Err()
		case time.Now().After(deadline):
			return fmt.Errorf("waiting for the server that runs there: %w", err)
		}
		// This fails while there is a server. Without one it may have failed
		// because of one that has gone since, but not twice.
		if err := db.start(ctx, sockets, opts); err != nil && db.server() == (server{}) {
			if failed {
				return err
			}
			failed = true
		}
	}
}

// start runs the server and waits until it is ready or has failed.
func (db *localDB) start(ctx context.Context, sockets string, opts []string) error {
	settings := "" // for a shell
	for _, opt := range append([]string{"listen_addresses=", "port=5432", "unix_socket_directories=" + sockets, "unix_socket_permissions=0700"}, opts...) {
		settings += " -c '" + strings.ReplaceAll(opt, "'", `'\''`) + "'"
	}
	log := filepath.Join(db.dir, "server.log")
	old, _ := os.ReadFile(log)
	if err := db.run(ctx, db.bin+"/pg_ctl", "start", "-w", "-D", "data", "-l", "server.log", "-o", settings); err != nil {
		text, _ := os.ReadFile(log)
		return fmt.Errorf("starting it: %w\n%s", err, bytes.TrimPrefix(text, old))
	}
	return nil
}

// claim takes the lock that makes this process the only user of the running
// server, or returns the name of its holder. The lock is a session's: it goes
// with the process, however that ends, on any system.
func (db *localDB) claim(ctx context.Context) (holder string, err error) {
	running := db.server()
	if running.state != "ready" {
		return "", fmt.Errorf("process %q is %q", running.pid, running.state)
	}
	url := fmt.Sprintf("host=%s port=%s user=postgres dbname=postgres sslmode=disable", running.sockets, running.port)
	lock, err := OpenDB(fmt.Sprintf("%s application_name='tasks (process %d)'", url, os.Getpid()))
	if err != nil {
		return "", err
	}
	lock.SetMaxOpenConns(1)
	lock.SetConnMaxIdleTime(0)
	holder, err = tryLock(ctx, lock)
	// The lock of the one who stops a server is free a moment before the server
	// has gone, but after the server has said that it is stopping.
	if err == nil && db.server() != running {
		err = errors.New("the server is stopping")
	}
	if err != nil || holder != "" {
		lock.Close()
		return holder, err
	}
	db.URL, db.sockets, db.lock = url, running.sockets, lock
	return "", nil
}

// tryLock takes the lock, also when lock's session has it already, or returns
// the name of its holder. One that has gone in between is NULL, an error.
func tryLock(ctx context.Context, lock *sql.DB) (holder string, err error) {
	err = lock.QueryRowContext(ctx, `
		SELECT CASE WHEN pg_try_advisory_lock(1, 1) THEN '' ELSE
		   (SELECT application_name FROM pg_locks JOIN pg_stat_activity USING (pid)
		     WHERE locktype = 'advisory' AND (classid, objid, objsubid) = (1, 1, 2)) END`).Scan(&holder)
	return holder, err
}

// A server is what PostgreSQL's file postmaster.pid says of a server; of one that was killed, it
// says it still.
type server struct{ pid, port, sockets, state string }

// server returns the zero value when no server runs
func (db *localDB) server() server {
	text, _ := os.ReadFile(filepath.Join(db.dir, "data", "postmaster.pid"))
	lines := append(strings.Split(string(text), "\n"), make([]string, 8)...)
	return server{pid: lines[0], port: lines[3], sockets: lines[4], state: strings.TrimSpace(lines[7])}
}

// run runs a program in db.dir, for root as localAccount. Its output is part of
// the error, which is ctx.Err() when ctx ended it.
func (db *localDB) run(ctx context.Context, name string, args ...string) error {
	argv := append([]string{name}, args...)
	if os.Geteuid() == 0 {
		// An interrupt is SIGTERM to what su runs, and a SIGKILL two seconds
		// later. Let pg_ctl use these to see the server up.
		argv = append([]string{"su", "-s", "/bin/sh", "-c", `trap "" TERM; exec "$@"`, "--", localAccount, "sh"}, argv...)
	}
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Dir = db.dir
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 10 * time.Second
	out, err := cmd.CombinedOutput()
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return ctx.Err()
	}
	return fmt.Errorf("%s: %w: %s", filepath.Base(name), err, bytes.TrimSpace(out))
}

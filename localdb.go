package main

// localdb.go runs a PostgreSQL server that belongs to this service alone, from
// the programs installed on the machine: for a quick start, and for the tests.

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"
)

const (
	localTimeout = time.Minute   // of a start, recovery after a crash included, and of a stop
	localAccount = "postgres"    // runs PostgreSQL for root, whom it refuses
	localSockets = "/tmp/tasks-" // not in $TMPDIR: a socket's path has at most 103 bytes, and localAccount must reach it

	// Debian, PostgreSQL's own packages for Red Hat, Homebrew, from source, Postgres.app
	localPrograms = "/usr/lib/postgresql/*/bin /usr/pgsql-*/bin /opt/homebrew/opt/postgresql*/bin " +
		"/usr/local/opt/postgresql*/bin /usr/local/pgsql/bin /Applications/Postgres.app/Contents/Versions/*/bin"
)

// A localDB is a private PostgreSQL server, in use by this process only. Of its
// directory, data is the database cluster and server.log what the server logs.
// It listens on a Unix socket that nobody but its account, and root, can reach.
//
// The server is a process of its own. It outlives a service that is killed; the
// next start finds it running.
type localDB struct {
	URL string // of its database postgres, for OpenDB

	dir     string // absolute
	bin     string // where initdb, pg_ctl and postgres are
	opts    []string
	sockets string  // the directory of the socket
	lock    *sql.DB // one connection, whose session has the lock; nil once stopped
}

// startLocalDB starts the server whose files are in dir, or takes over the one
// that runs there; it makes the directory and the cluster if they are missing.
// The programs are those in the directory bin or, when that is empty, the first
// found that fit the cluster. The opts are settings of the server, such as
// "fsync=off", without white space; a server found running keeps its own.
//
// When another process uses the server, the error says which. An error leaves
// nothing half done, and wraps ctx.Err() when ctx ended the start.
func startLocalDB(ctx context.Context, dir, bin string, opts ...string) (*localDB, error) {
	if runtime.GOOS == "windows" {
		return nil, errors.New("a private PostgreSQL needs a Unix system: set DATABASE_URL")
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	db := &localDB{dir: dir, bin: bin, opts: opts}
	for _, step := range []func(context.Context) error{db.findPrograms, db.makeDir, db.makeCluster, db.open} {
		if err := step(ctx); err != nil {
			return nil, fmt.Errorf("private PostgreSQL in %s: %w", dir, err)
		}
	}
	// What killed starts have left; those of rivals have been overtaken.
	unfinished, _ := filepath.Glob(dir + "/initdb-*")
	for _, name := range unfinished {
		os.RemoveAll(name)
	}
	return db, nil
}

// Stop ends the server and waits until it has gone. Only the first call does
// anything.
func (db *localDB) Stop() (err error) {
	if db.lock == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), localTimeout)
	defer cancel()
	// The server in the directory need not be this one: after a crash another
	// process may have started another, and may start the next as soon as this
	// one has gone, for which pg_ctl -w would go on waiting.
	if db.postmaster().sockets == db.sockets {
		err = db.run(ctx, db.bin+"/pg_ctl", "stop", "-W", "-m", "fast", "-D", "data")
	}
	// Not every directory that postmaster.pid names is to be removed.
	if ok, _ := filepath.Match(localSockets+"*", db.sockets); ok {
		err = errors.Join(err, os.RemoveAll(db.sockets))
	}
	for err == nil && db.postmaster().sockets == db.sockets {
		time.Sleep(10 * time.Millisecond)
		err = ctx.Err()
	}
	db.lock.Close()
	db.lock = nil
	if err != nil {
		return fmt.Errorf("stopping the private PostgreSQL in %s: %w", db.dir, err)
	}
	return nil
}

// findPrograms makes sure that the programs fit the cluster. If db.bin is empty,
// it looks for them on PATH and in the usual places, there newest first.
func (db *localDB) findPrograms(ctx context.Context) error {
	dirs := []string{db.bin}
	if db.bin == "" {
		dirs = nil
		if file, err := exec.LookPath("pg_ctl"); err == nil {
			dirs = append(dirs, filepath.Dir(file))
		}
		for _, pattern := range strings.Fields(localPrograms) {
			found, _ := filepath.Glob(pattern)
			slices.Reverse(found)
			dirs = append(dirs, found...)
		}
	}
	want, others := db.version(), []string(nil)
	for _, dir := range dirs {
		dir, _ = filepath.Abs(dir) // programs are run in db.dir
		var major int
		out, _ := exec.CommandContext(ctx, filepath.Join(dir, "postgres"), "--version").Output()
		fmt.Sscanf(string(out), "postgres (PostgreSQL) %d", &major)
		switch {
		case major < 14:
		case want == "" || want == fmt.Sprint(major):
			db.bin = dir
			return nil
		default:
			others = append(others, fmt.Sprintf("%d in %s", major, dir))
		}
	}
	if others == nil {
		return fmt.Errorf("no programs of PostgreSQL 14 or later found in %s: install them (make run does; or apt-get install postgresql, "+
			"dnf install postgresql-server, brew install postgresql), set PG_BIN to their directory, or set DATABASE_URL", cmp.Or(db.bin, "PATH or the usual places"))
	}
	return fmt.Errorf("its data are of version %s, the programs found of %s: set PG_BIN to the directory of programs of version %[1]s, "+
		"convert the data with pg_upgrade or pg_dump, or move them away to begin anew", want, strings.Join(others, ", "))
}

// makeDir makes the directory and makes sure that the programs can write there.
func (db *localDB) makeDir(ctx context.Context) error {
	who := "this user"
	err := os.MkdirAll(db.dir, 0o700)
	if os.Geteuid() == 0 {
		who = "the user " + localAccount + " (PostgreSQL refuses to run as root)"
		if db.version() == "" {
			exec.Command("chown", "-h", localAccount, db.dir).Run() // a failure shows below
		}
	}
	if err == nil {
		err = db.run(ctx, "touch", filepath.Join(db.dir, "server.log"))
	}
	if err != nil {
		return fmt.Errorf("%s must be able to reach and write it: %w (start in another directory or as another user, or set DATABASE_URL)", who, err)
	}
	return nil
}

// makeCluster makes the database cluster unless there is one. It is made beside
// its place: there it is whole or not at all, and the first of several wins.
func (db *localDB) makeCluster(ctx context.Context) error {
	if db.version() != "" {
		return nil
	}
	name := "initdb-" + rand.Text()
	defer os.RemoveAll(filepath.Join(db.dir, name))
	// Whoever reaches the socket is trusted; no order of text is asked for.
	args := []string{"-D", name, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-locale"}
	if slices.Contains(db.opts, "fsync=off") {
		args = append(args, "--no-sync")
	}
	err := db.run(ctx, db.bin+"/initdb", args...)
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
// process starts or stops one, open waits for what comes of that.
func (db *localDB) open(ctx context.Context) error {
	sockets := "" // of the server that this has started last
	removeUnused := func() {
		if db.postmaster().sockets != sockets {
			os.RemoveAll(sockets)
		}
	}
	defer removeUnused()
	// A server that has come up in spite of an interrupt is claimed all the same,
	// so that it can be stopped.
	claimCtx, cancel := context.WithTimeout(context.WithoutCancel(ctx), localTimeout)
	defer cancel()
	for refusals, failures := 0, 0; ; time.Sleep(20 * time.Millisecond) {
		holder, err := db.claim(claimCtx)
		switch {
		case holder != "" && refusals < 10: // perhaps its process was killed just now
			refusals++
			continue
		case holder != "":
			return fmt.Errorf("%s is using it: stop that, start in another directory, or set DATABASE_URL", holder)
		case err == nil && ctx.Err() != nil:
			return errors.Join(ctx.Err(), db.Stop())
		case err == nil:
			return nil
		case claimCtx.Err() != nil:
			return fmt.Errorf("waiting for the server that runs there: %w", err)
		case ctx.Err() != nil:
			// One without a socket as yet may be ours, on its way up or down.
			if server := db.postmaster(); server.pid == "" || server.sockets != "" && server.sockets != sockets {
				return ctx.Err()
			}
			continue
		}
		removeUnused()
		sockets = localSockets + rand.Text()[:10]
		// This fails as long as there is a server. If there is none, one may
		// have been in the way that has gone since; but not time after time.
		if err := db.start(ctx, sockets); err != nil && db.postmaster() == (postmaster{}) {
			if failures++; failures == 3 {
				return err
			}
		}
	}
}

// start runs the server and waits until it is ready or has failed.
func (db *localDB) start(ctx context.Context, sockets string) error {
	if err := db.run(ctx, "mkdir", "-m", "700", sockets); err != nil {
		return err
	}
	log := filepath.Join(db.dir, "server.log")
	info, err := os.Stat(log)
	if err != nil {
		return err
	}
	opts := append([]string{"", "listen_addresses=", "port=5432", "unix_socket_directories=" + sockets, "unix_socket_permissions=0700"}, db.opts...)
	if err := db.run(ctx, db.bin+"/pg_ctl", "start", "-w", "-D", "data", "-l", "server.log", "-o", strings.Join(opts, " -c ")); err != nil {
		said, _ := os.ReadFile(log)
		return fmt.Errorf("starting it: %w\n%s", err, said[min(info.Size(), int64(len(said))):])
	}
	return nil
}

// claim takes the lock that makes this process the only user of the running
// server, or returns the name of its holder. The lock is a session's: it goes
// with the process, however that ends, on any system.
func (db *localDB) claim(ctx context.Context) (holder string, err error) {
	running := db.postmaster()
	if running.state != "ready" {
		return "", fmt.Errorf("process %s is %q", running.pid, running.state)
	}
	url := fmt.Sprintf("host=%s port=%s user=postgres dbname=postgres sslmode=disable", running.sockets, running.port)
	lock, err := OpenDB(fmt.Sprintf("%s application_name='tasks (process %d)'", url, os.Getpid()))
	if err != nil {
		return "", err
	}
	lock.SetMaxOpenConns(1)
	lock.SetConnMaxIdleTime(0)
	// A holder that has gone in between is NULL, which is an error here.
	err = lock.QueryRowContext(ctx, `
		SELECT CASE WHEN pg_try_advisory_lock(1, 1) THEN '' ELSE
		   (SELECT application_name FROM pg_locks JOIN pg_stat_activity USING (pid)
		     WHERE locktype = 'advisory' AND (classid, objid, objsubid) = (1, 1, 2)) END`).Scan(&holder)
	// The lock of whoever stops the server is free a moment before the server
	// has gone, but after the server has said that it is stopping.
	if err == nil && db.postmaster() != running {
		err = errors.New("the server is stopping")
	}
	if err != nil || holder != "" {
		lock.Close()
		return holder, err
	}
	db.URL, db.sockets, db.lock = url, running.sockets, lock
	return "", nil
}

// A postmaster is what the file postmaster.pid says of the server.
type postmaster struct{ pid, port, sockets, state string }

// postmaster returns the server that runs, or that was killed; else the zero value.
func (db *localDB) postmaster() postmaster {
	text, _ := os.ReadFile(filepath.Join(db.dir, "data", "postmaster.pid"))
	lines := append(strings.Split(string(text), "\n"), make([]string, 8)...)
	return postmaster{pid: lines[0], port: lines[3], sockets: lines[4], state: strings.TrimSpace(lines[7])}
}

// run runs a program in db.dir, for root as localAccount. Its output is part of
// the error, which is ctx.Err() when ctx ended it.
func (db *localDB) run(ctx context.Context, name string, args ...string) error {
	argv := append([]string{name}, args...)
	if os.Geteuid() == 0 {
		// Of an interrupt su makes SIGTERM and, two seconds later, SIGKILL.
		// Within these pg_ctl sees the server up, so that it can be found.
		argv = append([]string{"su", "-s", "/bin/sh", "-c", `trap "" TERM; exec "$@"`, "--", localAccount, "sh"}, argv...)
	}
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Dir = db.dir
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 10 * time.Second
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	err := cmd.Run()
	if err == nil {
		return nil
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return fmt.Errorf("%s: %w: %s", filepath.Base(name), err, bytes.TrimSpace(stderr.Bytes()))
}

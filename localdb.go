package main

// localdb.go runs a PostgreSQL server that belongs to this service alone, from
// the programs installed on the machine: for a quick start, and for the tests.

import (
	"cmp"
	"context"
	"crypto/rand"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

const (
	localTimeout = time.Minute   // for a start, including recovery after a crash, and for a stop
	localAccount = "postgres"    // runs PostgreSQL when the service runs as root, which PostgreSQL refuses
	localSockets = "/tmp/tasks-" // not $TMPDIR: a socket's path is at most 103 bytes long, and localAccount must reach it

	// Debian, PostgreSQL's own packages for Red Hat, Alpine, Homebrew, from source, Postgres.app
	localPrograms = "/usr/lib/postgresql/*/bin /usr/pgsql-*/bin /usr/libexec/postgresql* /opt/homebrew/opt/postgresql*/bin " +
		"/usr/local/opt/postgresql*/bin /usr/local/pgsql/bin /Applications/Postgres.app/Contents/Versions/*/bin"
)

// A localDB is a private PostgreSQL server that only this process uses. In its
// directory, data is the database cluster and server.log is the server's log. It
// listens on a Unix socket that only its account and root can reach.
//
// The server is a separate process. It outlives a service that is killed; the
// next start takes it over.
type localDB struct {
	URL string // of its database postgres, for OpenDB

	dir     string // absolute
	bin     string // where initdb, pg_ctl and postgres are
	opts    []string
	sockets string  // the directory of the socket
	lock    *sql.DB // one connection, whose session holds the lock
}

// startLocalDB starts the server whose files are in dir, or takes over the one
// that runs there. It creates the directory and the cluster if they are missing.
// It uses the programs in the directory bin or, if bin is empty, the first that it
// finds and that fit the cluster. The opts are settings of the server without
// white space, such as "fsync=off"; a running server keeps its own.
//
// If another process uses the server, the error names it. After an error nothing
// is left half done. If ctx ends first, the error wraps ctx.Err().
func startLocalDB(ctx context.Context, dir, bin string, opts ...string) (*localDB, error) {
	dir, _ = filepath.Abs(dir) // run runs programs there
	db := &localDB{dir: dir, bin: bin, opts: opts}
	for _, step := range []func(context.Context) error{db.findPrograms, db.makeDir, db.makeCluster, db.open} {
		if err := step(ctx); err != nil {
			return nil, fmt.Errorf("private PostgreSQL in %s: %w", dir, errors.Join(ctx.Err(), err))
		}
	}
	// Killed starts leave these. A concurrent start no longer needs its own: data
	// exists.
	exec.Command("sh", "-c", `rm -rf "$1"/initdb-*`, "sh", dir).Run()
	return db, nil
}

// Stop stops the server and waits until it is gone.
func (db *localDB) Stop() (err error) {
	running := func() bool { return db.postmaster().sockets == db.sockets }
	// The server in the directory may be another one: after a crash of this one,
	// another process may have started it. It may also start one as soon as this
	// one is gone, and pg_ctl -w would then wait for that one to stop.
	if running() {
		err = db.run(context.Background(), db.bin+"/pg_ctl", "stop", "-W", "-m", "fast", "-D", "data")
	}
	// postmaster.pid could name any directory, such as /tmp itself.
	if ok, _ := filepath.Match(localSockets+"*", db.sockets); ok {
		err = errors.Join(err, os.RemoveAll(db.sockets))
	}
	for deadline := time.Now().Add(localTimeout); err == nil && running(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			err = fmt.Errorf("the private PostgreSQL in %s still runs after %v", db.dir, localTimeout)
		}
	}
	db.lock.Close()
	return err
}

// findPrograms checks that the programs in db.bin fit the cluster. If db.bin is
// empty, it searches PATH and the usual places, the newest version there first.
func (db *localDB) findPrograms(ctx context.Context) error {
	dirs := []string{db.bin}
	if db.bin == "" {
		dirs = filepath.SplitList(os.Getenv("PATH"))
		for _, pattern := range strings.Fields(localPrograms) {
			found, _ := filepath.Glob(pattern)
			slices.Reverse(found)
			dirs = append(dirs, found...)
		}
	}
	want := db.version()
	for _, dir := range dirs {
		dir, _ = filepath.Abs(dir) // run runs programs in db.dir
		var major int
		out, _ := exec.CommandContext(ctx, filepath.Join(dir, "postgres"), "--version").Output()
		fmt.Sscanf(string(out), "postgres (PostgreSQL) %d", &major)
		if major >= 14 && (want == "" || want == fmt.Sprint(major)) {
			db.bin = dir
			return nil
		}
	}
	if want != "" {
		return fmt.Errorf("the data is of version %s, and the programs of that version are not found: set PG_BIN to their directory, "+
			"convert the data with pg_upgrade or pg_dump, or move it away to start afresh", want)
	}
	return fmt.Errorf("no PostgreSQL 14 or later found in %s: set DATABASE_URL, or install PostgreSQL (apt-get install postgresql, "+
		"dnf install postgresql-server, apk add postgresql, brew install postgresql), or set PG_BIN to the directory of its programs",
		cmp.Or(db.bin, "PATH or the usual places"))
}

// makeDir creates the directory and checks that the programs can write there.
func (db *localDB) makeDir(ctx context.Context) error {
	err := os.MkdirAll(db.dir, 0o700)
	if os.Geteuid() == 0 && db.version() == "" {
		exec.Command("chown", "-h", localAccount, db.dir).Run() // touch reports a failure
	}
	if err == nil {
		err = db.run(ctx, "touch", filepath.Join(db.dir, "server.log"))
	}
	if err != nil {
		return fmt.Errorf("PostgreSQL, which runs as the user %s if this is root, must be able to reach it and write to it: "+
			"%w (start in another directory or as another user, or set DATABASE_URL)", localAccount, err)
	}
	return nil
}

// makeCluster creates the database cluster unless there is one. It creates it
// under another name and renames it: data is complete or missing, and the first
// of several starts wins.
func (db *localDB) makeCluster(ctx context.Context) error {
	if db.version() != "" {
		return nil
	}
	name := filepath.Join(db.dir, "initdb-"+rand.Text())
	defer os.RemoveAll(name)
	// A client that can reach the socket is trusted. Text sorts by code point.
	args := []string{"-D", name, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-locale"}
	err := db.run(ctx, db.bin+"/initdb", args...)
	if err == nil {
		err = os.Rename(name, filepath.Join(db.dir, "data"))
	}
	if err != nil && db.version() == "" {
		return fmt.Errorf("creating the database, which takes 60 MB of disk space: %w", err)
	}
	return nil
}

// version returns the major version of the database cluster, "" if there is none.
func (db *localDB) version() string {
	text, _ := os.ReadFile(filepath.Join(db.dir, "data", "PG_VERSION"))
	return strings.TrimSpace(string(text))
}

// open claims the server and starts it if none is running. While another process
// starts or stops one, open waits for the outcome.
func (db *localDB) open(ctx context.Context) (err error) {
	sockets := localSockets + rand.Text()[:10] // of a server that this call starts
	defer func() {
		if db.postmaster().sockets != sockets {
			os.RemoveAll(sockets)
		}
	}()
	// If ctx ends while the server is starting, open still claims it, to stop it.
	claimCtx, cancel := context.WithTimeout(context.WithoutCancel(ctx), localTimeout)
	defer cancel()
	// It gives up after ten refusals, or three failures, which count four each.
	for strikes := 0; strikes < 10; time.Sleep(20 * time.Millisecond) {
		holder, claimErr := db.claim(claimCtx)
		switch server := db.postmaster(); {
		case holder != "":
			// A holder that was just killed loses the lock in a moment.
			err = fmt.Errorf("%s is using it: stop that, start in another directory, or set DATABASE_URL", holder)
			strikes++
		case claimErr == nil && ctx.Err() != nil:
			return errors.Join(ctx.Err(), db.Stop())
		case claimErr == nil || claimCtx.Err() != nil:
			return claimErr
		case ctx.Err() == nil:
			// This fails while another server runs, which may be gone by now.
			if err = db.start(claimCtx, sockets); err != nil && db.postmaster() == (postmaster{}) {
				strikes += 4
			}
		case server.pid == "" || server.sockets != "" && server.sockets != sockets:
			return ctx.Err() // no server, or not ours; one without a socket may be ours
		}
	}
	return err
}

// start runs the server and waits until it is ready or has failed.
func (db *localDB) start(ctx context.Context, sockets string) error {
	if err := db.run(ctx, "mkdir", "-p", "-m", "700", sockets); err != nil {
		return err
	}
	log := filepath.Join(db.dir, "server.log") // pg_ctl passes its name for it to a shell
	before, _ := os.ReadFile(log)
	opts := append([]string{"", "listen_addresses=", "port=5432", "unix_socket_directories=" + sockets, "unix_socket_permissions=0700"}, db.opts...)
	if err := db.run(ctx, db.bin+"/pg_ctl", "start", "-w", "-D", "data", "-l", "server.log", "-o", strings.Join(opts, " -c ")); err != nil {
		after, _ := os.ReadFile(log)
		return fmt.Errorf("starting it: %w\n%s", err, strings.TrimPrefix(string(after), string(before)))
	}
	return nil
}

// claim takes the lock that makes this process the only user of the running
// server, or returns the name of its holder. The lock belongs to a session, so it
// ends with the process, however that ends, on any system.
func (db *localDB) claim(ctx context.Context) (holder string, err error) {
	running := db.postmaster()
	if running.state != "ready" {
		return "", fmt.Errorf("the server (process %s) is %q", running.pid, running.state)
	}
	url := fmt.Sprintf("host=%s port=%s user=postgres dbname=postgres sslmode=disable", running.sockets, running.port)
	lock, err := OpenDB(fmt.Sprintf("%s application_name='tasks (process %d)'", url, os.Getpid()))
	if err != nil {
		return "", err
	}
	lock.SetConnMaxIdleTime(0)
	// The result is NULL, an error here, if the holder has just gone.
	err = lock.QueryRowContext(ctx, `
		SELECT CASE WHEN pg_try_advisory_lock(1, 1) THEN '' ELSE
		   (SELECT application_name FROM pg_locks JOIN pg_stat_activity USING (pid)
		     WHERE locktype = 'advisory' AND (classid, objid, objsubid) = (1, 1, 2)) END`).Scan(&holder)
	// A stopping server writes that to postmaster.pid before it ends the session
	// that holds the lock.
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

// A postmaster is the server that the file postmaster.pid describes.
type postmaster struct{ pid, port, sockets, state string }

// postmaster returns the server that runs or was killed, else the zero value.
func (db *localDB) postmaster() postmaster {
	text, _ := os.ReadFile(filepath.Join(db.dir, "data", "postmaster.pid"))
	lines := append(strings.Split(string(text), "\n"), make([]string, 8)...)
	return postmaster{pid: lines[0], port: lines[3], sockets: lines[4], state: strings.TrimSpace(lines[7])}
}

// run runs a program in db.dir, as localAccount if this process is root. When ctx
// ends, run interrupts the program, which then cleans up.
func (db *localDB) run(ctx context.Context, name string, args ...string) error {
	argv := append([]string{name}, args...)
	if os.Geteuid() == 0 {
		// When su is interrupted, it sends SIGTERM and, two seconds later, SIGKILL.
		// pg_ctl finishes in these two seconds.
		argv = append([]string{"su", "-s", "/bin/sh", "-c", `trap "" TERM; exec "$@"`, "--", localAccount, "sh"}, argv...)
	}
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Dir = db.dir
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	_, err := cmd.Output()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		return fmt.Errorf("%s: %w: %s", filepath.Base(name), err, strings.TrimSpace(string(exit.Stderr)))
	}
	return err
}

package main

// store_test.go tests what HTTP cannot show: the schema, who may apply it and
// how often, its constraints against the rules of task.go, which calls share a
// statement, and which index serves which page.

import (
	"cmp"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"
)

// newRole returns the URL of a database for a role of its own, which may do
// nothing there that not everybody may.
func newRole(t *testing.T, dbURL string) (roleURL, role string) {
	t.Helper()
	db := open(t, dbURL)
	defer db.Close()
	if err := db.QueryRow("SELECT 'role_of_' || current_database()").Scan(&role); err != nil {
		t.Fatal(err)
	}
	execSQL(t, dbURL, "REVOKE CREATE ON SCHEMA public FROM PUBLIC") // as it is from PostgreSQL 15 on
	execSQL(t, dbURL, "CREATE ROLE "+role+" LOGIN")
	return strings.Replace(dbURL, "user=postgres", "user="+role, 1), role
}

// applySchema applies the schema as a start does, and returns where it is.
func applySchema(t *testing.T, dbURL string) (schema string, err error) {
	t.Helper()
	db := open(t, dbURL)
	defer db.Close()
	ctx, cancel := context.WithTimeout(t.Context(), promptly)
	defer cancel()
	if err := NewStore(db).Migrate(ctx); err != nil {
		return "", err
	}
	return NewStore(db).qualify(ctx, "{schema}")
}

// previousSchema is the schema of the previous version, without its constraint
// against blank titles.
const previousSchema = `
	CREATE TABLE tasks (
		id uuid PRIMARY KEY, user_id text CHECK (char_length(user_id) BETWEEN 1 AND 255),
		title text NOT NULL CHECK (char_length(title) <= 200), description text CHECK (char_length(description) <= 10000),
		completed boolean NOT NULL DEFAULT false, version bigint NOT NULL DEFAULT 1 CHECK (version >= 1),
		created_at timestamptz NOT NULL DEFAULT now(), updated_at timestamptz NOT NULL DEFAULT now(),
		idempotency_key text, idempotency_digest bytea,
		CONSTRAINT tasks_updated_at CHECK (updated_at >= created_at),
		CONSTRAINT tasks_idempotency CHECK ((idempotency_key IS NULL) = (idempotency_digest IS NULL)));
	CREATE INDEX tasks_completed_id ON tasks (completed, id);
	CREATE INDEX tasks_user_id_id ON tasks (user_id, id);
	CREATE INDEX tasks_completed_user_id_id ON tasks (completed, user_id, id);
	CREATE UNIQUE INDEX tasks_idempotency_key ON tasks (coalesce(user_id, ''), idempotency_key) WHERE idempotency_key IS NOT NULL;`

const forbidDDL = `
	CREATE FUNCTION forbid() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'no DDL'; END $$;
	CREATE EVENT TRIGGER forbid ON ddl_command_start EXECUTE FUNCTION forbid()`

// A complete schema stays as it is. A start needs only the privileges to use it,
// and waits for no lock on the table.
func TestMigrateStanding(t *testing.T) {
	t.Parallel()
	for name, setup := range map[string]string{
		"new":                 "",
		"previous version":    "DROP TABLE tasks;" + previousSchema,
		"event trigger":       forbidDDL,
		"other index options": "ALTER INDEX tasks_user_id_id SET (fillfactor = 70); ALTER INDEX tasks_idempotency_key RENAME TO k",
		"other columns":       "ALTER TABLE tasks DROP description, ADD description text, ADD due date, ADD n int NOT NULL DEFAULT 1, ADD m int GENERATED ALWAYS AS IDENTITY",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dbURL := newDatabase(t)
			roleURL, role := newRole(t, dbURL)
			execSQL(t, dbURL, "ALTER DEFAULT PRIVILEGES GRANT SELECT, INSERT, UPDATE, DELETE ON TABLES TO "+role)
			a := newAPIOn(t, dbURL, Options{})
			execSQL(t, dbURL, setup)
			state := func() (s string) {
				if err := a.db.QueryRow(`SELECT string_agg(concat_ws(' ', relname, relfilenode, relchecks), ' ' ORDER BY relname)
					FROM pg_class WHERE relnamespace = 'public'::regnamespace`).Scan(&s); err != nil {
					t.Error(err)
				}
				return s
			}
			before, unlock := state(), lockTasks(t, dbURL, "LOCK TABLE tasks IN EXCLUSIVE MODE; SELECT pg_advisory_xact_lock(hashtext('tasks schema'))")
			for _, url := range []string{dbURL, roleURL, dbURL + " default_transaction_read_only=on"} {
				if schema, err := applySchema(t, url); err != nil || schema != "public" {
					t.Errorf("schema %q, %v", schema, err)
				}
			}
			unlock()
			if after := state(); after != before {
				t.Errorf("before %s\nafter  %s", before, after)
			}
			made := a.create(`{"title":"a"}`, "Idempotency-Key", "k")
			if again := a.create(`{"title":"a"}`, "Idempotency-Key", "k"); again != made {
				t.Errorf("made %+v, then %+v", made, again)
			}
		})
	}
}

// A standby can be started on, and what is missing there is an error that may pass.
func TestMigrateStandby(t *testing.T) {
	t.Parallel()
	primary := newServer(t)
	standby := newStandby(t, primary, shortTempDir(t))
	if _, err := applySchema(t, standby.URL); sqlState(err) != "25006" || !errors.Is(err, ErrUnavailable) {
		t.Error(err)
	}
	execSQL(t, primary.URL, "SET synchronous_commit = remote_apply; "+schema)
	if schema, err := applySchema(t, standby.URL); err != nil || schema != "public" {
		t.Errorf("schema %q, %v", schema, err)
	}
}

// What the service could not work with is named, and left as it is.
func TestMigrateRefuses(t *testing.T) {
	t.Parallel()
	dbURL := newDatabase(t)
	_, prefix := newRole(t, dbURL)
	db := open(t, dbURL)
	defer db.Close()
	const sqlModel = `CREATE TABLE tasks (id serial PRIMARY KEY, user_id varchar, title varchar NOT NULL, description varchar,
		completed boolean NOT NULL, created_at timestamp NOT NULL, updated_at timestamp NOT NULL)`
	for i, tt := range []struct {
		name, setup string // $role and $here, its schema, are the case's own
		want        string // in the error
	}{
		{"no table, no privilege", "", `there is no table $here.tasks, and role "$role" may not create it: GRANT CREATE ON SCHEMA $here`},
		{"no schema", "DROP SCHEMA $here", `search_path ($here) names no schema that exists`},
		{"no privilege on the schema", "REVOKE USAGE ON SCHEMA $here FROM $role", "GRANT USAGE on it"},
		{"no SELECT", "$schema; GRANT INSERT, UPDATE, DELETE ON tasks TO $role", "GRANT SELECT ON $here.tasks TO $role"},
		{"no INSERT", "$schema; GRANT SELECT, UPDATE, DELETE ON tasks TO $role", "GRANT INSERT ON"},
		{"no UPDATE", "$schema; GRANT SELECT, INSERT, DELETE ON tasks TO $role", "GRANT UPDATE ON"},
		{"no DELETE", "$schema; GRANT SELECT, INSERT, UPDATE ON tasks TO $role", "GRANT DELETE ON"},
		{"nothing granted", "$schema", "GRANT SELECT, INSERT, UPDATE, DELETE ON"},
		{"not the owner, index missing", "$schema; GRANT ALL ON tasks TO $role; GRANT CREATE ON SCHEMA $here TO $role; DROP INDEX tasks_idempotency_key",
			`there is no index $here.tasks_idempotency_key, and role "$role" may not create it`},
		{"no privilege to create, index missing", "$schema; ALTER TABLE tasks OWNER TO $role; DROP INDEX tasks_user_id_id", "there is no index $here.tasks_user_id_id, and"},
		{"index invalid", "$schema; ALTER TABLE tasks OWNER TO $role; GRANT CREATE ON SCHEMA $here TO $role; UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'tasks_user_id_id'::regclass",
			"DROP INDEX $here.tasks_user_id_id"},
		{"index on other columns", "$schema; ALTER TABLE tasks OWNER TO $role; DROP INDEX tasks_idempotency_key; CREATE UNIQUE INDEX tasks_idempotency_key ON tasks (user_id, idempotency_key)",
			"DROP INDEX $here.tasks_idempotency_key"},
		{"index not unique", "$schema; ALTER TABLE tasks OWNER TO $role; DROP INDEX tasks_idempotency_key; CREATE INDEX tasks_idempotency_key ON tasks (coalesce(user_id, ''), idempotency_key) WHERE idempotency_key IS NOT NULL",
			"DROP INDEX $here.tasks_idempotency_key"},
		{"no primary key", "$schema; GRANT ALL ON tasks TO $role; ALTER TABLE tasks DROP CONSTRAINT tasks_pkey", "no index $here.tasks_id,"},
		{"column missing", "$schema; GRANT ALL ON tasks TO $role; ALTER TABLE tasks DROP description", `table $here.tasks does not fit this service: alter it, set another search_path, or carry its tasks over (README, "Coming from SQLModel"); it has no column "description text" (`},
		{"column of another type", "$schema; GRANT ALL ON tasks TO $role; ALTER TABLE tasks ALTER version TYPE int", `has column "version integer NOT NULL", not "version bigint NOT NULL" (`},
		{"column that may be null", "$schema; GRANT ALL ON tasks TO $role; ALTER TABLE tasks ALTER version DROP NOT NULL", `has column "version bigint", not "version bigint NOT NULL" (`},
		{"column that may not be null", "$schema; GRANT ALL ON tasks TO $role; ALTER TABLE tasks ADD due date NOT NULL", `has column "due date NOT NULL" without a default (`},
		{"SQLModel's table", sqlModel + "; ALTER TABLE tasks OWNER TO $role; GRANT CREATE ON SCHEMA $here TO $role", `column "id integer NOT NULL", not "id uuid NOT NULL", `},
		{"column that is computed", "$schema; GRANT ALL ON tasks TO $role; ALTER TABLE tasks DROP description, ADD description text GENERATED ALWAYS AS (title) STORED",
			`has column "description text GENERATED ALWAYS", not "description text" (`},
		{"column of a domain that may not be null", "$schema; GRANT ALL ON tasks TO $role; CREATE DOMAIN day AS date NOT NULL; ALTER TABLE tasks ADD due day", `has column "due date" without a default (`},
		{"row-level security", "$schema; GRANT ALL ON tasks TO $role; ALTER TABLE tasks ENABLE ROW LEVEL SECURITY", `hides all rows of table $here.tasks from role "$role"`},
		{"unlogged", "$schema; GRANT ALL ON tasks TO $role; ALTER TABLE tasks SET UNLOGGED", "ALTER TABLE $here.tasks SET LOGGED"},
		{"view", "CREATE VIEW tasks AS SELECT 1 AS id", "$here.tasks is not an ordinary table"},
		{"materialized view", "CREATE MATERIALIZED VIEW tasks AS SELECT 1 AS id", "$here.tasks is not an ordinary table"},
	} {
		here, role := fmt.Sprint("schema_", i), fmt.Sprint(prefix, "_", i)
		fill := strings.NewReplacer("$role", role, "$here", here, "$schema", schema)
		execSQL(t, dbURL, fill.Replace("CREATE SCHEMA $here; CREATE ROLE $role LOGIN; GRANT USAGE ON SCHEMA $here TO $role"))
		url := dbURL + " search_path=" + here
		execSQL(t, url, fill.Replace(tt.setup))
		const objects = "SELECT coalesce(string_agg(c::text || i::text, ' ' ORDER BY c.oid), '') FROM pg_class c LEFT JOIN pg_index i ON indexrelid = c.oid WHERE relnamespace::regnamespace::text = $1"
		var before, after string
		beforeErr := db.QueryRow(objects, here).Scan(&before)
		_, err := applySchema(t, strings.Replace(url, "user=postgres", "user="+role, 1))
		if want := fill.Replace(tt.want); err == nil || transient(err) || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v\nwant %s", tt.name, err, want)
		}
		if err := cmp.Or(db.QueryRow(objects, here).Scan(&after), beforeErr); err != nil || after != before {
			t.Errorf("%s: %v\nbefore %s\nafter  %s", tt.name, err, before, after)
		}
	}
}

// A missing index is made, but a lock that it needs is not waited for.
func TestMigrateIndex(t *testing.T) {
	t.Parallel()
	dbURL := newDatabase(t)
	execSQL(t, dbURL, schema+"; DROP INDEX tasks_idempotency_key; ALTER TABLE tasks DROP CONSTRAINT tasks_pkey")
	unlock := lockTasks(t, dbURL, "LOCK TABLE tasks IN ROW EXCLUSIVE MODE")
	if _, err := applySchema(t, dbURL); sqlState(err) != "55P03" || !errors.Is(err, ErrUnavailable) {
		t.Errorf("with a write under way: %v", err)
	}
	unlock()
	if _, err := applySchema(t, dbURL); err != nil {
		t.Fatal(err)
	}
	if n := queryInt(t, dbURL, "SELECT count(*) FROM pg_index WHERE indrelid = 'tasks'::regclass AND indisvalid"); n != 5 {
		t.Errorf("%d indexes", n)
	}
}

// Starts that come together make the schema once, and a missing index, whatever
// isolation they have.
func TestMigrateTogether(t *testing.T) {
	t.Parallel()
	for _, isolation := range []string{"read committed", "serializable"} {
		dbURL := newDatabase(t) + " default_transaction_isolation='" + isolation + "'"
		for _, before := range []string{"SELECT", "DROP INDEX tasks_user_id_id"} {
			execSQL(t, dbURL, before)
			together(8, func(int) {
				waitFor(t, "the schema", func() bool {
					_, err := applySchema(t, dbURL)
					if err != nil && sqlState(err) != "55P03" { // a start waits for a second
						t.Error(isolation, err)
					}
					return err == nil
				})
			})
		}
	}
}

// The schema is the first of the connection's own search_path that exists,
// whatever another client has left in the session.
func TestMigrateSearchPath(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct{ name, setup, params, want string }{
		{"default", "", "", "public"},
		{"in the connection string", "CREATE SCHEMA mine", " search_path=nowhere,mine,public", "mine"},
		{"the role's", "CREATE SCHEMA mine; ALTER ROLE $role SET search_path = mine, public", "", "mine"},
		{"of the role's name", "CREATE SCHEMA $role", "", "$role"},
		{"quoted", `CREATE SCHEMA "we""ird, Schema"`, ` search_path='"we""ird, Schema"'`, `"we""ird, Schema"`},
		{"pooler", "CREATE SCHEMA mine; ALTER ROLE $role SET search_path = mine, public", "", "mine"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			dbURL := newDatabase(t)
			roleURL, role := newRole(t, dbURL)
			fill := strings.NewReplacer("$role", role)
			execSQL(t, dbURL, "CREATE SCHEMA theirs; CREATE TABLE theirs.tasks (); ALTER ROLE "+role+" SUPERUSER; "+fill.Replace(tt.setup))
			if tt.name == "pooler" {
				roleURL = pooled(t, roleURL)
			}
			db := open(t, roleURL+tt.params)
			defer db.Close()
			db.SetMaxOpenConns(1) // a pooler with one server connection
			for _, left := range []string{"", "theirs"} {
				if _, err := db.Exec("CREATE TEMP TABLE IF NOT EXISTS tasks (); SELECT set_config('search_path', '" + left + "', false)"); err != nil {
					t.Fatal(err)
				}
				got, err := NewStore(db).qualify(t.Context(), "{schema}")
				if want := fill.Replace(tt.want); got != want || err != nil {
					t.Errorf("schema %s, %v; want %s", got, err, want)
				}
				if err := NewStore(db).Migrate(t.Context()); err != nil {
					t.Error(err)
				}
				if n := queryInt(t, dbURL, "SELECT count(*) FROM pg_index WHERE indrelid = $1::regclass", got+".tasks"); n != 5 {
					t.Errorf("%d indexes on %s.tasks", n, got)
				}
				var path string
				if err := db.QueryRow("SHOW search_path").Scan(&path); err != nil || path != left {
					t.Errorf("search_path is now %q, %v", path, err)
				}
			}
		})
	}
	if _, err := applySchema(t, "host=/nowhere"); !errors.Is(err, ErrUnavailable) {
		t.Error(err)
	}
}

func TestMigrateEncoding(t *testing.T) {
	t.Parallel()
	dbURL := newDatabase(t)
	name := "ascii_of_" + regexp.MustCompile("dbname=([^ ]*)").FindStringSubmatch(dbURL)[1]
	execSQL(t, dbURL, "CREATE DATABASE "+name+" ENCODING 'SQL_ASCII' TEMPLATE template0")
	t.Cleanup(func() { execSQL(t, testServer.URL, "DROP DATABASE "+name+" WITH (FORCE)") })
	_, err := applySchema(t, strings.Replace(dbURL, "dbname=", "dbname="+name+" application_name=", 1))
	if err == nil || !strings.Contains(err.Error(), "encoding of the database is SQL_ASCII, not UTF8") {
		t.Error(err)
	}
}

// psql makes the same schema.
func TestSchemaByHand(t *testing.T) {
	t.Parallel()
	dbURL := newDatabase(t)
	pgCtlPath, err := filepath.EvalSymlinks(testServer.bin + "/pg_ctl") // beside which psql is
	if err != nil {
		t.Fatal(err)
	}
	psql := exec.Command(filepath.Dir(pgCtlPath)+"/psql", "-X", "-v", "ON_ERROR_STOP=1", "-d", dbURL, "-f", "schema.sql")
	if out, err := psql.CombinedOutput(); err != nil || string(out) != "DO\nDO\n" {
		t.Fatalf("%v\n%s", err, out)
	}
	execSQL(t, dbURL, forbidDDL)
	newAPIOn(t, dbURL, Options{}).create(`{"title":"a"}`, "Idempotency-Key", "k")
}

// The rules of task.go and the constraints agree on every code point.
func TestBlankTitles(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{})
	var checks string
	if err := a.db.QueryRow(`SELECT string_agg(pg_get_expr(conbin, 0), ' AND ') FROM pg_constraint WHERE contypid = 'task_title'::regtype`).Scan(&checks); err != nil {
		t.Fatal(err)
	}
	var got string
	if err := a.db.QueryRow(`SELECT string_agg(to_hex(n), ' ' ORDER BY n)
		FROM (SELECT n, chr(n) AS value FROM generate_series(1, x'10FFFF'::int) n WHERE n NOT BETWEEN x'D800'::int AND x'DFFF'::int) c
		WHERE NOT (` + checks + `)`).Scan(&got); err != nil {
		t.Fatal(err)
	}
	var want []string
	for r := rune(1); r <= 0x10FFFF; r++ {
		if (r < 0xD800 || r > 0xDFFF) && titleViolations(string(r)) != nil {
			want = append(want, fmt.Sprintf("%x", r))
		}
	}
	if got != strings.Join(want, " ") || len(want) != 25 {
		t.Errorf("PostgreSQL refuses %s\nthe service %s", got, want)
	}
}

func TestConstraints(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{})
	rules := map[string]func(string) []string{"title": titleViolations, "description": descriptionViolations, "user_id": userIDViolations}
	for column, limit := range map[string]int{"title": 200, "description": 10_000, "user_id": 255} {
		for _, text := range []string{
			"", " ", "\t\u00a0\u2003", " a ", "a\u3000", "\u200b",
			strings.Repeat(" ", limit), strings.Repeat("\u3000", limit+1),
			strings.Repeat("🙂", limit), strings.Repeat("🙂", limit+1),
			strings.Repeat("a", limit-1) + "\u0301", strings.Repeat("a", limit) + "\u0301",
		} {
			insert := fmt.Sprintf("INSERT INTO tasks (id, title, %s) VALUES ("+idOf("(random() * 1e9)::int")+", 'a', $1)", column)
			if column == "title" {
				insert = "INSERT INTO tasks (id, title) VALUES (" + idOf("(random() * 1e9)::int") + ", $1)"
			}
			_, err := a.db.Exec(insert, text)
			if want := rules[column](text); (sqlState(err) == "23514") != (want != nil) || err != nil && want == nil {
				t.Errorf("%s %.20q of %d bytes: PostgreSQL: %v, the service: %s", column, text, len(text), err, want)
			}
		}
	}
	a.exec("INSERT INTO tasks (id, title, created_at, updated_at, idempotency_key, idempotency_digest) VALUES ('" + noTask + "', 'kept', " +
		"'0001-01-01Z', '9999-12-31 23:59:59.999999Z', repeat('é', 255), sha256(''))")
	for _, values := range []string{
		"id = gen_random_uuid()", "id = '00000000-0000-0000-0000-000000000000'", "id = 'ffffffff-ffff-ffff-ffff-ffffffffffff'", "id = '019c2292-294b-774b-ce0f-5b3a1f6c9d42'",
		"created_at = '-infinity'", "created_at = '0001-12-31 23:59:59.999999Z BC'", "updated_at = '10000-01-01Z'", "updated_at = 'infinity'",
		"idempotency_key = '', idempotency_digest = sha256('')", "idempotency_key = repeat('é', 256), idempotency_digest = sha256('')",
		"idempotency_key = 'k', idempotency_digest = '0'", "title = NULL", "completed = NULL", "version = NULL", "version = 0", "version = -1", "created_at = NULL", "updated_at = NULL",
		"created_at = now() + interval '1 microsecond', updated_at = now()", "idempotency_key = NULL", "idempotency_digest = NULL",
	} {
		_, err := a.db.Exec("UPDATE tasks SET " + values + " WHERE title = 'kept'")
		if state := sqlState(err); state != "23514" && state != "23502" {
			t.Errorf("%s: %v", values, err)
		}
	}
	if n := queryInt(t, a.dbURL, "SELECT count(*) FROM pg_attribute WHERE attrelid = 'tasks'::regclass AND attcollation = '\"C\"'::regcollation"); n != 4 {
		t.Errorf("%d columns compare by code point", n)
	}
}

// No two tasks of a Store have the same time of creation, however fast they come.
func TestTimesOfCreation(t *testing.T) {
	t.Parallel()
	var s database
	var seen sync.Map
	together(4, func(int) {
		var last time.Time
		for range 5000 {
			now := s.now()
			if _, again := seen.LoadOrStore(now, true); again || !now.After(last) || now.Nanosecond()%1000 != 0 {
				t.Fatalf("%v came after %v, or twice: %t", now, last, again)
			}
			last = now
		}
	})
}

// With prepared statements no page is planned for its own values.
func TestPlansAreKept(t *testing.T) {
	t.Parallel()
	a := newAPIWithPool(t, newDatabase(t), 1, "true", Options{})
	for range 10 {
		a.want(200, a.do("GET", "/api/tasks?user_id=alice&limit=10", ""))
	}
	var custom, generic int
	if err := a.db.QueryRow("SELECT sum(custom_plans), sum(generic_plans) FROM pg_prepared_statements").Scan(&custom, &generic); err != nil || custom != 0 || generic < 10 {
		t.Errorf("%d plans for given values, %d uses of a kept plan, %v", custom, generic, err)
	}
}

// A trigger that drops what is stored is a defect, not a task that is missing or
// a key that is taken.
func TestDroppedRow(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{})
	a.log.expected.Store(true)
	id := a.create(`{"title":"a"}`, "Idempotency-Key", "taken").ID
	a.exec(`CREATE FUNCTION drop_row() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'`)
	a.exec("CREATE TRIGGER drop_row BEFORE INSERT OR UPDATE ON tasks FOR EACH ROW EXECUTE FUNCTION drop_row()")
	for _, op := range append(operations(id)[3:6], operations(id)[0]) {
		a.want(500, a.do(op.method, op.path, op.body))
	}
	a.want(500, a.do("POST", "/api/tasks", `{"title":"a"}`, "Idempotency-Key", "new"))
}

// A row that PostgreSQL refuses, or that cannot be read, costs only the request
// about it.
func TestBadRow(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{RequestTimeout: patience})
	a.log.expected.Store(true)
	a.exec("ALTER TABLE tasks ADD CONSTRAINT strange CHECK (title <> 'bad') NOT VALID")
	ids := a.newTasks(2)
	a.exec("ALTER TABLE tasks DROP CONSTRAINT tasks_row")
	a.exec("UPDATE tasks SET created_at = '-infinity' WHERE id = '" + ids[1] + "'")
	together(100, func(i int) {
		title, create, fetch := "good", 201, 200
		if i%50 == 0 {
			title, create, fetch = "bad", 500, 500
		}
		a.want(create, a.do("POST", "/api/tasks", `{"title":"`+title+`"}`))
		a.want(fetch, a.do("GET", "/api/tasks/"+ids[min(fetch-200, 1)], ""))
	})
}

func TestIndexes(t *testing.T) {
	t.Parallel()
	for _, prepare := range []string{"false", "true"} {
		t.Run(fmt.Sprintf("prepare=%v", prepare == "true"), func(t *testing.T) {
			t.Parallel()
			testIndexes(t, prepare)
		})
	}
}

func testIndexes(t *testing.T, prepare string) {
	dbURL := newDatabase(t)
	if prepare == "true" {
		// A plan for any values depends on these, and must be the same.
		execSQL(t, dbURL, `DO $$ BEGIN
			EXECUTE format('ALTER DATABASE %I SET effective_cache_size = 100', current_database());
			EXECUTE format('ALTER DATABASE %I SET random_page_cost = 40', current_database());
			END $$`)
	}
	setup := open(t, dbURL)
	if err := NewStore(setup).Migrate(t.Context()); err != nil {
		t.Fatal(err)
	}
	setup.Close()
	// Half of the tasks are completed, and one in 4 each alice's and
	// dave's. All others have few: what comes behind dave's must not be taken for as little.
	execSQL(t, dbURL, `INSERT INTO tasks (id, title, description, user_id, completed)
		SELECT `+idOf("n")+`, 'a', repeat('d', 400), (ARRAY['alice', 'aaron' || n % 991, 'carol' || n % 997, 'dave'])[1 + n % 4], n / 4 % 2 = 0 FROM generate_series(1, 40000) n`)
	execSQL(t, dbURL, `INSERT INTO tasks (id, title, user_id) SELECT `+idOf("n")+`, 'a', 'eve' || n FROM generate_series(40001, 40500) n`)
	execSQL(t, dbURL, "ANALYZE tasks")
	observer := open(t, dbURL)
	defer observer.Close()
	observer.SetMaxOpenConns(1)
	const blocks = 25
	for _, tt := range []struct {
		name   string
		filter Filter
		want   string // index
	}{
		{"all", Filter{Limit: 10}, "tasks_pkey"},
		{"completed", Filter{Limit: 10, Completed: new(true)}, "tasks_completed_id"},
		{"not completed", Filter{Limit: 10, Completed: new(false)}, "tasks_completed_id"},
		{"alice's", Filter{Limit: 10, Owner: new("alice")}, "tasks_user_id_id"},
		{"dave's", Filter{Limit: 1000, Owner: new("dave")}, "tasks_user_id_id"},
		{"alice's, completed", Filter{Limit: 10, Owner: new("alice"), Completed: new(true)}, "tasks_completed_user_id_id"},
		{"alice's, not completed", Filter{Limit: 10, Owner: new("alice"), Completed: new(false)}, "tasks_completed_user_id_id"},
		{"dave's, not completed", Filter{Limit: 200, Owner: new("dave"), Completed: new(false)}, "tasks_completed_user_id_id"},
		{"few of a user, not completed", Filter{Limit: 100, Owner: new("aaron100"), Completed: new(false)}, "tasks_completed_user_id_id"},
		{"few of the last user, not completed", Filter{Limit: 100, Owner: new("eve40500"), Completed: new(false)}, "tasks_completed_user_id_id"},
		{"few of a user", Filter{Limit: 100, Owner: new("carol100")}, "tasks_user_id_id"},
	} {
		limit := tt.filter.Limit
		for _, descending := range []bool{false, true} {
			for _, after := range []string{"", "00000000-0000-7000-8000-000000020000"} {
				tt.filter.Descending, tt.filter.After = descending, after
				before := indexUse(t, observer, 0)
				db, err := openDB(dbURL, prepare)
				if err != nil {
					t.Fatal(err)
				}
				page, more, err := NewStore(db).List(t.Context(), tt.filter)
				few := strings.HasPrefix(tt.name, "few")
				if err != nil || !few && len(page) != limit || more == few {
					t.Fatal(tt.name, len(page), more, err)
				}
				db.Close()
				want := len(page)
				if more {
					want++
				}
				for index, now := range indexUse(t, observer, 1+before["all"].scans) {
					was := before[index]
					read := use{now.scans - was.scans, now.entries - was.entries, now.blocks - was.blocks}
					most := use{1, 1, 5} // the planner may look at the end of an index
					switch index {
					case tt.want:
						most = use{2, want + 1, blocks}
					case "all":
						continue
					}
					if read.scans > most.scans || read.entries > most.entries || read.blocks > most.blocks {
						t.Errorf("%s, descending %t, after %q: read %+v of %s, want at most %+v", tt.name, descending, after, read, index, most)
					}
				}
			}
		}
	}
}

// idOf is SQL for an id that sorts by a number.
func idOf(n string) string {
	return "('00000000-0000-7000-8000-' || lpad(" + n + "::text, 12, '0'))::uuid"
}

// use is how often an index was used, and how much was read of it.
type use struct{ scans, entries, blocks int }

// indexUse returns the use of each index, of the table itself as "table", and of
// all of them as "all". It waits until the other sessions have ended, which is
// when they report, and have reported so many scans.
func indexUse(t *testing.T, db *sql.DB, scans int) map[string]use {
	t.Helper()
	const query = `WITH uses AS (
		SELECT 'table' AS name, seq_scan AS scans, seq_tup_read AS entries, 0 AS blocks FROM pg_stat_user_tables WHERE relname = 'tasks' UNION ALL
		SELECT indexrelname, idx_scan, idx_tup_read, idx_blks_hit + idx_blks_read
		  FROM pg_stat_user_indexes JOIN pg_statio_user_indexes USING (indexrelid, indexrelname) WHERE indexrelname LIKE 'tasks%')
		SELECT * FROM uses UNION ALL SELECT 'all', sum(scans), sum(entries), sum(blocks) FROM uses`
	awaitQuery(t, db, "the statistics", fmt.Sprintf(`SELECT NOT EXISTS (SELECT FROM pg_stat_activity
		WHERE datname = current_database() AND backend_type = 'client backend' AND pid <> pg_backend_pid())
		AND %d <= (SELECT scans FROM (%s) u WHERE name = 'all')`, scans, query))
	rows, err := db.Query(query)
	if err != nil {
		t.Fatal(err)
	}
	defer rows.Close()
	all := map[string]use{}
	for rows.Next() {
		var name string
		var u use
		if err := rows.Scan(&name, &u.scans, &u.entries, &u.blocks); err != nil {
			t.Fatal(err)
		}
		all[name] = u
	}
	if err := rows.Err(); err != nil {
		t.Fatal(err)
	}
	return all
}

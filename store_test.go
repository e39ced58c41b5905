package main

// store_test.go tests what HTTP cannot show: the schema, who may apply it and
// how often, its constraints against the rules of task.go, which calls share a
// statement, and which index serves which page.

import (
	"context"
	"database/sql"
	"fmt"
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

func TestMigrateAgain(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{})
	task := a.create(`{"title":"a"}`)
	const objects = "SELECT string_agg(relname || relfilenode, ' ' ORDER BY relname) FROM pg_class WHERE relname LIKE 'tasks%'"
	var before, after string
	if err := a.db.QueryRow(objects).Scan(&before); err != nil {
		t.Fatal(err)
	}
	if err := a.store.Migrate(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := a.db.QueryRow(objects).Scan(&after); err != nil || after != before {
		t.Errorf("%v: before %s\nafter %s", err, before, after)
	}
	if got := a.task(a.do("GET", "/api/tasks/"+task.ID, "")); got != task {
		t.Errorf("got %+v, want %+v", got, task)
	}
}

// A start beside a standing schema waits for no write that is under way, so that
// no other has to wait for it.
func TestMigrateBesideWrites(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{})
	tx, err := a.db.Begin()
	if err == nil {
		_, err = tx.Exec("INSERT INTO tasks (id, title) VALUES (gen_random_uuid(), 'a')")
	}
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback()
	ctx, cancel := context.WithTimeout(t.Context(), promptly)
	defer cancel()
	if err := a.store.Migrate(ctx); err != nil {
		t.Error(err)
	}
}

// What another schema on the search path has is not taken for one's own.
func TestMigrateOtherSchema(t *testing.T) {
	t.Parallel()
	dbURL := newDatabase(t)
	newAPIOn(t, dbURL, Options{}).create(`{"title":"a"}`)
	execSQL(t, dbURL, "CREATE SCHEMA mine")
	a := newAPIOn(t, dbURL+" search_path=mine,public", Options{})
	a.create(`{"title":"b"}`, "Idempotency-Key", "k")
	if n := queryInt(t, dbURL, "SELECT count(*) FROM pg_indexes WHERE schemaname = 'mine'"); n != 5 {
		t.Errorf("%d indexes", n)
	}
}

func TestMigrateTogether(t *testing.T) {
	t.Parallel()
	dbURL := newDatabase(t)
	together(8, func(int) {
		db := open(t, dbURL)
		defer db.Close()
		if err := NewStore(db).Migrate(t.Context()); err != nil {
			t.Error(err)
		}
	})
	newAPIOn(t, dbURL, Options{}).create(`{"title":"a"}`)
}

// A role that may not create tables, or does not own the one that stands, has
// what it needs. Where none stands it is told what it lacks.
func TestMigrateWithoutPrivileges(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name   string
		stands bool
		grants string // to the role
		want   string // in the error
	}{
		{"tables may be used", true, "GRANT SELECT, INSERT, UPDATE, DELETE ON tasks TO %s", ""},
		{"others may be made too", true, "GRANT SELECT, INSERT, UPDATE, DELETE ON tasks TO %[1]s; GRANT CREATE ON SCHEMA public TO %[1]s", ""},
		{"table may not be read", true, "", "permission denied"},
		{"no table", false, "", "permission denied for schema public"},
		{"no table, but may make one", false, "GRANT CREATE ON SCHEMA public TO %s", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			dbURL := newDatabase(t)
			roleURL, role := newRole(t, dbURL)
			if tt.stands {
				newAPIOn(t, dbURL, Options{})
			}
			if tt.grants != "" {
				execSQL(t, dbURL, fmt.Sprintf(tt.grants, role))
			}
			if tt.want == "" {
				a := newAPIOn(t, roleURL, Options{}) // which migrates
				for _, op := range operations(a.create(`{"title":"a"}`, "Idempotency-Key", "k").ID) {
					a.want(op.want, a.do(op.method, op.path, op.body))
				}
				return
			}
			db := open(t, roleURL)
			defer db.Close()
			err := NewStore(db).Migrate(t.Context())
			if err == nil || transient(err) || !strings.HasPrefix(err.Error(), "apply the schema: ") || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want %s", err, tt.want)
			}
		})
	}
}

// The rules of task.go and the constraints agree on every code point.
func TestBlankTitles(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{})
	var checks string
	if err := a.db.QueryRow(`SELECT string_agg(pg_get_expr(conbin, conrelid), ' AND ') FROM pg_constraint
		WHERE conrelid = 'tasks'::regclass AND contype = 'c' AND pg_get_expr(conbin, conrelid) LIKE '%title%'`).Scan(&checks); err != nil {
		t.Fatal(err)
	}
	var got string
	if err := a.db.QueryRow(`SELECT string_agg(to_hex(n), ' ' ORDER BY n)
		FROM (SELECT n, chr(n) AS title FROM generate_series(1, x'10FFFF'::int) n WHERE n NOT BETWEEN x'D800'::int AND x'DFFF'::int) c
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
			insert := fmt.Sprintf("INSERT INTO tasks (id, title, %s) VALUES (gen_random_uuid(), 'a', $1)", column)
			if column == "title" {
				insert = "INSERT INTO tasks (id, title) VALUES (gen_random_uuid(), $1)"
			}
			_, err := a.db.Exec(insert, text)
			if want := rules[column](text); (sqlState(err) == "23514") != (want != nil) || err != nil && want == nil {
				t.Errorf("%s %.20q of %d bytes: PostgreSQL: %v, the service: %s", column, text, len(text), err, want)
			}
		}
	}
	for _, values := range []string{
		"title = NULL", "completed = NULL", "version = NULL", "version = 0", "version = -1", "created_at = NULL", "updated_at = NULL",
		"updated_at = created_at - interval '1 microsecond'", "idempotency_key = 'k'", "idempotency_digest = ''",
	} {
		_, err := a.db.Exec("UPDATE tasks SET " + values)
		if state := sqlState(err); state != "23514" && state != "23502" {
			t.Errorf("%s: %v", values, err)
		}
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
	a := newAPIWithPool(t, newDatabase(t), 1, prepareAlways, Options{})
	for range 10 {
		a.want(200, a.do("GET", "/api/tasks?user_id=alice&limit=10", ""))
	}
	var custom, generic int
	if err := a.db.QueryRow("SELECT sum(custom_plans), sum(generic_plans) FROM pg_prepared_statements").Scan(&custom, &generic); err != nil || custom != 0 || generic < 10 {
		t.Errorf("%d plans for given values, %d uses of a kept plan, %v", custom, generic, err)
	}
}

// A row that PostgreSQL refuses, or that cannot be read, costs only the request
// about it.
func TestBadRow(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{})
	a.log.expected.Store(true)
	a.exec("ALTER TABLE tasks ADD CONSTRAINT strange CHECK (title <> 'bad') NOT VALID")
	ids := a.newTasks(2)
	a.exec("ALTER TABLE tasks DROP CONSTRAINT IF EXISTS tasks_times")
	a.exec("UPDATE tasks SET created_at = '-infinity' WHERE id = '" + ids[1] + "'")
	together(100, func(i int) {
		title, create, fetch := "good", 201, 200
		if i%10 == 0 {
			title, create, fetch = "bad", 500, 500
		}
		a.want(create, a.do("POST", "/api/tasks", `{"title":"`+title+`"}`))
		a.want(fetch, a.do("GET", "/api/tasks/"+ids[min(fetch-200, 1)], ""))
	})
}

func TestIndexes(t *testing.T) {
	t.Parallel()
	for _, prepare := range []prepareMode{prepareNever, prepareAlways} {
		t.Run(fmt.Sprintf("prepare=%v", prepare == prepareAlways), func(t *testing.T) {
			t.Parallel()
			testIndexes(t, prepare)
		})
	}
}

func testIndexes(t *testing.T, prepare prepareMode) {
	dbURL := newDatabase(t)
	if prepare == prepareAlways {
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
					most := use{1, 1, 4} // the planner may look at the end of an index
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

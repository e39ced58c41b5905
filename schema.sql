-- The schema of the task service: the table, its constraints, its indexes.
-- Every start applies it, and psql -f schema.sql does the same by hand. It is
-- idempotent, and its changes are one statement: all are applied, or none.
--
-- If the schema is complete, nothing is written and no lock is taken on the
-- table: no privilege to create, no writable server is needed, and requests of
-- other instances go on. If the service could not work with what is there, an
-- error says what is wrong and what to do.
DO $$
BEGIN
    IF current_setting('server_encoding') <> 'UTF8' THEN
        RAISE EXCEPTION 'the encoding of the database is %, not UTF8: create one with ENCODING ''UTF8'' TEMPLATE template0',
            current_setting('server_encoding') USING ERRCODE = 'feature_not_supported';
    END IF;
END
$$;

DO $schema$
DECLARE
    -- What the service needs, in the words of format_type and pg_get_indexdef.
    columns_needed CONSTANT text[] := ARRAY[
        'id uuid NOT NULL', 'user_id text', 'title text NOT NULL', 'description text',
        'completed boolean NOT NULL', 'version bigint NOT NULL',
        'created_at timestamp with time zone NOT NULL', 'updated_at timestamp with time zone NOT NULL',
        'idempotency_key text', 'idempotency_digest bytea'];

    -- One index for each way to list, each ending in id, so that a page is one
    -- range of one index, in either direction, however deep and however rare
    -- the matching tasks. No two begin with user_id: PostgreSQL might read all
    -- tasks of a user from one and sort them, instead of a page from the other.
    -- Per task they cost about 40 bytes (completed) and 60 to 70 bytes (user_id)
    -- each, and one insertion each at creation. An update that changes completed
    -- writes to all of them. Partial indexes (WHERE completed, WHERE NOT completed)
    -- are not cheaper. Without (user_id, id) it is cheaper, but then each page of a
    -- user is merged from two ranges.
    --
    -- An Idempotency-Key belongs to an owner. Tasks without an owner share the
    -- empty string, which is no user_id. (NULLS NOT DISTINCT would say it better,
    -- but PostgreSQL 14 lacks it.)
    indexes_needed CONSTANT text[] := ARRAY[
        'CREATE UNIQUE INDEX tasks_id ON tasks USING btree (id)', -- or the primary key
        'CREATE INDEX tasks_completed_id ON tasks USING btree (completed, id)',
        'CREATE INDEX tasks_user_id_id ON tasks USING btree (user_id, id)',
        'CREATE INDEX tasks_completed_user_id_id ON tasks USING btree (completed, user_id, id)',
        $$CREATE UNIQUE INDEX tasks_idempotency_key ON tasks USING btree (COALESCE(user_id, ''::text), idempotency_key) WHERE idempotency_key IS NOT NULL$$];

    here    text; -- the schema
    tasks   text; -- the table, with its schema
    missing text[];
    locked  boolean := false;
    wrong   text;
    ddl     text;
BEGIN
    -- A lock that is not granted within a second is an error, and the caller
    -- tries again: behind a lock that waits, requests would wait too.
    SET LOCAL lock_timeout = '1s';

    -- Behind a pooler, another client may have left its own search_path in the
    -- session. DEFAULT is the one of this connection. A temporary table tasks
    -- would come first, unless pg_temp is named last. Names that are quoted
    -- without need would differ from those below.
    SET LOCAL search_path TO DEFAULT;
    SET LOCAL quote_all_identifiers = off;
    here := current_schema();
    IF here IS NULL THEN
        RAISE EXCEPTION 'search_path (%) names no schema that exists and that role "%" may use: create the schema, GRANT USAGE on it, or set another search_path',
            current_setting('search_path'), current_user USING ERRCODE = 'invalid_schema_name';
    END IF;
    PERFORM set_config('search_path', format('%I, pg_temp', here), true);
    tasks := format('%I.tasks', here);

    IF to_regclass(tasks) IS NULL THEN
        IF NOT has_schema_privilege(here, 'CREATE') THEN
            RAISE EXCEPTION 'there is no table %, and role "%" may not create it: GRANT CREATE ON SCHEMA %, or apply schema.sql as another role',
                tasks, current_user, quote_ident(here) USING ERRCODE = 'insufficient_privilege';
        END IF;
        PERFORM pg_advisory_xact_lock(hashtext('tasks schema')); -- because IF NOT EXISTS fails when two starts run it at once

        -- The constraints repeat the rules of task.go, so that no other writer
        -- can store what the service would refuse or could not serve. Text is
        -- never measured in bytes: char_length counts code points. It is
        -- compared by code point, too, so an upgrade of the system's locales
        -- leaves the indexes valid.
        --
        -- Most rules belong to domains. PostgreSQL checks a domain only when its
        -- column is assigned, but a table's own constraints at every UPDATE: with 11
        -- of those, completing a task took it a third longer.
        --
        -- A table that an earlier version has made stays as it is. It lacks
        -- COLLATE "C", the rules of ids and times, and the lengths of key and
        -- digest.
        IF to_regtype('task_id') IS NULL THEN
            -- RFC 9562: the version is 7, the variant 2.
            CREATE DOMAIN task_id AS uuid CHECK (get_byte(uuid_send(VALUE), 6) >> 4 = 7 AND get_byte(uuid_send(VALUE), 8) >> 6 = 2);
            CREATE DOMAIN task_user_id AS text COLLATE "C" CHECK (char_length(VALUE) BETWEEN 1 AND 255);
            -- Not only white space. The list is Unicode's White_Space; E'\v'
            -- would be the letter v.
            CREATE DOMAIN task_title AS text COLLATE "C" CHECK (char_length(VALUE) <= 200)
                CONSTRAINT task_title_blank CHECK (btrim(VALUE, E'\u0009\u000A\u000B\u000C\u000D\u0020\u0085\u00A0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200A\u2028\u2029\u202F\u205F\u3000') <> '');
            CREATE DOMAIN task_description AS text COLLATE "C" CHECK (char_length(VALUE) <= 10000);
            CREATE DOMAIN task_key AS text COLLATE "C" CHECK (char_length(VALUE) BETWEEN 1 AND 255);
            CREATE DOMAIN task_digest AS bytea CHECK (octet_length(VALUE) = 32); -- SHA-256
        END IF;
        CREATE TABLE IF NOT EXISTS tasks (
            id                 task_id      PRIMARY KEY,      -- sorts by creation
            user_id            task_user_id,
            title              task_title   NOT NULL,
            description        task_description,
            completed          boolean      NOT NULL DEFAULT false,
            version            bigint       NOT NULL DEFAULT 1,
            created_at         timestamptz  NOT NULL DEFAULT now(),
            updated_at         timestamptz  NOT NULL DEFAULT now(),
            idempotency_key    task_key,                      -- lives as long as its task
            idempotency_digest task_digest,                   -- of what was asked for

            -- Years have four digits; infinity is beyond them.
            CONSTRAINT tasks_row CHECK (version >= 1 AND (idempotency_key IS NULL) = (idempotency_digest IS NULL)
                AND created_at >= '0001-01-01 00:00:00+00' AND updated_at >= created_at AND updated_at < '10000-01-01 00:00:00+00')
        );
    END IF;

    -- Another program's table stays untouched.
    IF (SELECT relkind <> 'r' OR relpersistence <> 'p' FROM pg_class WHERE oid = to_regclass(tasks)) THEN
        RAISE EXCEPTION '% is not an ordinary table that survives a crash: rename it, ALTER TABLE % SET LOGGED, or set another search_path',
            tasks, tasks USING ERRCODE = 'wrong_object_type';
    END IF;
    WITH needed AS (
        SELECT split_part(needed, ' ', 1) AS name, needed AS definition FROM unnest(columns_needed) AS needed
    ), have AS (
        SELECT attname AS name, (attnotnull OR typnotnull) AND NOT atthasdef AND attidentity = '' AND typdefault IS NULL AS must_be_set,
               concat_ws(' ', attname,
                CASE typtype WHEN 'd' THEN format_type(typbasetype, typtypmod) ELSE format_type(atttypid, atttypmod) END,
                CASE WHEN attnotnull THEN 'NOT NULL' END,
                CASE WHEN attgenerated <> '' OR attidentity = 'a' THEN 'GENERATED ALWAYS' END) AS definition
        FROM pg_attribute JOIN pg_type ON pg_type.oid = atttypid
        WHERE attrelid = to_regclass(tasks) AND attnum > 0 AND NOT attisdropped
    )
    SELECT string_agg(CASE
            WHEN have.name IS NULL THEN format('no column "%s"', needed.definition)
            WHEN needed.name IS NULL THEN format('column "%s" without a default', have.definition)
            ELSE format('column "%s", not "%s"', have.definition, needed.definition) END, ', ') INTO wrong
    FROM needed FULL JOIN have USING (name)
    WHERE needed.definition IS DISTINCT FROM have.definition AND (needed.name IS NOT NULL OR must_be_set);
    IF wrong IS NOT NULL THEN
        RAISE EXCEPTION 'table % does not fit this service: alter it, set another search_path, or carry its tasks over (README, "Coming from SQLModel"); it has %',
            tasks, wrong USING ERRCODE = 'invalid_table_definition';
    END IF;

    SELECT string_agg(privilege, ', ') INTO wrong FROM unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE']) AS privilege
    WHERE NOT has_table_privilege(tasks, privilege);
    IF wrong IS NOT NULL THEN
        RAISE EXCEPTION 'role "%" lacks privileges on table %: GRANT % ON % TO %',
            current_user, tasks, wrong, tasks, quote_ident(current_user) USING ERRCODE = 'insufficient_privilege';
    END IF;
    IF row_security_active(tasks) AND NOT EXISTS (SELECT FROM pg_policy WHERE polrelid = to_regclass(tasks)) THEN
        RAISE EXCEPTION 'row-level security hides all rows of table % from role "%": let the role own the table, without FORCE ROW LEVEL SECURITY, or CREATE POLICY',
            tasks, current_user USING ERRCODE = 'insufficient_privilege';
    END IF;

    -- Look for each index by its definition. If any is missing, look again with
    -- the lock that only one start can hold. It ends with the transaction, so it
    -- works behind a transaction-mode pooler too. pg_get_indexdef casts a domain.
    LOOP
        missing := ARRAY(
            SELECT needed FROM unnest(indexes_needed) AS needed
            WHERE NOT EXISTS (
                SELECT FROM pg_index
                WHERE indrelid = to_regclass(tasks) AND indisvalid
                  AND (indisunique OR needed NOT LIKE 'CREATE UNIQUE %')
                  AND split_part(regexp_replace(pg_get_indexdef(indexrelid, 0, true), ' WITH [(].*?[)]|(?<=user_id)::text', '', 'g'), ' USING ', 2) = split_part(needed, ' USING ', 2)));
        EXIT WHEN locked OR missing = '{}';
        PERFORM pg_advisory_xact_lock(hashtext('tasks schema'));
        locked := true;
    END LOOP;
    FOREACH ddl IN ARRAY missing LOOP
        wrong := format('%I.%I', here, substring(ddl FROM 'INDEX ([a-z_]+)'));
        IF to_regclass(wrong) IS NOT NULL THEN
            RAISE EXCEPTION '% is invalid, unfinished, or not what it should be: DROP INDEX %, and the next start runs %',
                wrong, wrong, ddl USING ERRCODE = 'object_not_in_prerequisite_state';
        ELSIF NOT pg_has_role((SELECT relowner FROM pg_class WHERE oid = to_regclass(tasks)), 'USAGE') OR NOT has_schema_privilege(here, 'CREATE') THEN
            RAISE EXCEPTION 'there is no index %, and role "%" may not create it: apply schema.sql as the owner of table %',
                wrong, current_user, tasks USING ERRCODE = 'insufficient_privilege';
        END IF;
        EXECUTE ddl;
    END LOOP;
END
$schema$;

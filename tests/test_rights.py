"""Works as the table's owner and no more; nothing can be slipped in, and no password gets out."""

from __future__ import annotations

import os
import re
from urllib.parse import quote

import psycopg
import pytest
from click.testing import CliRunner
from psycopg.conninfo import conninfo_to_dict

import runbook
from runbook import backup, cli, cutover, embedded, ledger, monitor, points, verify
from runbook.database import target
from runbook.errors import ApprovalMissing, BadInput, PlanBlocked, PromiseBroken
from tests import migration, servers

OWNED = ("users", "appointments", "doctors", "active_users")
SECRET = "it's a s3cret/with:every@thing"


@pytest.fixture
def owner(clinic, sql) -> str:
    """The clinic's URL for a role that owns its tables and is nothing else."""
    name = f"owner_{sql('SELECT current_database()')[0][0]}"
    database = sql("SELECT current_database()")[0][0]
    sql(
        f"CREATE ROLE {name} LOGIN; GRANT CREATE ON DATABASE {database} TO {name}; GRANT CREATE, USAGE ON SCHEMA public TO {name}"
    )
    for each in OWNED:
        sql(f"ALTER TABLE {each} OWNER TO {name}")
    yield clinic.replace("postgres@", f"{name}@")
    sql(f"DROP OWNED BY {name} CASCADE; DROP ROLE {name}")


@pytest.fixture
def orders(server, database, sql) -> dict[str, str]:
    """A table of a role without login, and the URL of a member of it, who migrates; with the names of both and of the database."""
    name = sql("SELECT current_database()")[0][0]
    me, group = f"mig_{name}", f"app_{name}"
    sql(f"CREATE ROLE {group} NOLOGIN; CREATE ROLE {me} LOGIN; GRANT {group} TO {me}; GRANT CREATE ON DATABASE {name} TO {me};"
        f" GRANT USAGE, CREATE ON SCHEMA public TO {me}, {group};"
        " CREATE TABLE orders (id bigserial PRIMARY KEY, region text NOT NULL, v text);"
        " INSERT INTO orders (region) SELECT (ARRAY['de', 'fr', 'us'])[1 + n % 3] FROM generate_series(1, 300) n;"
        f" ALTER TABLE orders OWNER TO {group}")  # fmt: skip
    yield {"url": database.replace("postgres@", f"{me}@"), "me": me, "group": group, "database": name}
    sql(f"DROP OWNED BY {me}, {group} CASCADE; DROP ROLE {me}, {group}")


def test_an_owner_that_may_only_add_rows_has_a_way_back(orders, server, sql):
    """Its table is append-only, but what was inserted since must be written into the original all the same."""
    sql(f"REVOKE UPDATE, DELETE, TRUNCATE ON orders FROM {orders['group']}")
    wanted = {"table": "orders", "key": "region", "partitions": {"o_de": ["de"], "o_rest": "default"}}
    if server.version < 17:  # there is nothing else that lets it lock the table
        with pytest.raises(PlanBlocked, match=f"may not lock public.orders. GRANT UPDATE ON public.orders TO {orders['me']};"):
            migration.plan(orders["url"], **wanted)
        sql(f"GRANT UPDATE ON orders TO {orders['me']}")
    rights = "SELECT acl::text FROM pg_class, unnest(relacl) acl WHERE oid = 'orders'::regclass"
    before = sql(rights)
    run = migration.forward(orders["url"], **wanted)
    assert sorted(sql(rights)) == sorted(before)
    sql(f"SET ROLE {orders['group']}; INSERT INTO orders (region) VALUES ('de'), ('fr'); RESET ROLE; UPDATE orders SET v = 'x' WHERE id = 1;"
        " DELETE FROM orders WHERE id = 2")  # fmt: skip
    migration.back(run)
    assert sql(rights) == before
    assert sql("SELECT count(*), count(v) FROM orders") == [(301, 1)]


def test_each_right_that_a_later_step_needs_is_named_before(orders, server, sql):
    """The role itself may be all that a schema, a type or a tablespace asks for; what is made belongs to the owner in the end."""
    me, group, space = orders["me"], orders["group"], orders["database"]
    sql(f"CREATE TYPE mood AS ENUM ('good'); ALTER TABLE orders ADD m mood[]; CREATE TABLE lines (id int PRIMARY KEY, order_id bigint REFERENCES orders);"
        f" CREATE FUNCTION fine(text) RETURNS boolean LANGUAGE sql IMMUTABLE AS 'SELECT true'; ALTER TABLE orders ADD CHECK (fine(region));"
        f" CREATE INDEX orders_v ON orders (v); ALTER TABLE lines OWNER TO {group}")  # fmt: skip
    sql(f"CREATE TABLESPACE {space} LOCATION '{servers.temporary_folder()}'")
    sql(f"ALTER INDEX orders_v SET TABLESPACE {space}")
    taken = {
        f"REVOKE CREATE ON SCHEMA public FROM {group}, PUBLIC": f"GRANT CREATE ON SCHEMA public TO {group};",
        "REVOKE USAGE ON TYPE mood FROM PUBLIC": f"GRANT USAGE ON TYPE public.mood TO {me};",
        "SELECT": f"GRANT CREATE ON TABLESPACE {space} TO {me};",
        "REVOKE USAGE ON LANGUAGE plpgsql FROM PUBLIC": f"GRANT USAGE ON LANGUAGE plpgsql TO {me};",
        f"REVOKE ALL ON orders FROM {group}; GRANT SELECT, INSERT ON orders TO {group}": f"GRANT TRIGGER ON public.orders TO {me};",
        f"REVOKE UPDATE ON lines FROM {group}": f"GRANT UPDATE ON public.lines TO {group};",
        "REVOKE EXECUTE ON FUNCTION fine FROM PUBLIC": f"GRANT EXECUTE ON FUNCTION public.fine(text) TO {me};",
    }
    if server.version >= 16:
        taken[f"GRANT {group} TO {me} WITH INHERIT TRUE, SET FALSE"] = f"GRANT {group} TO {me} WITH SET TRUE;"
    sql("; ".join(taken))
    wanted = {"table": "orders", "key": "region", "partitions": {"o_de": ["de"], "o_rest": "default"}, "unique": "global"}
    try:
        with pytest.raises(PlanBlocked) as refused:
            migration.plan(orders["url"], **wanted)
        assert not [way for way in taken.values() if way not in str(refused.value)]
        sql("".join(re.findall(r"GRANT [^;]*;", str(refused.value))))
        run = migration.forward(orders["url"], **wanted)
        sql("INSERT INTO orders (region) VALUES ('de')")
        migration.back(run)
    finally:
        sql("GRANT USAGE ON LANGUAGE plpgsql TO PUBLIC; DROP TABLE lines, orders")
        sql(f"DROP TABLESPACE {space}")


@pytest.mark.parametrize("definer", ["", "SECURITY DEFINER"])
def test_what_would_give_our_tables_away_or_leave_us_too_few_sessions_is_named_in_the_plan(orders, sql, definer):
    me, group, database = orders["me"], orders["group"], orders["database"]
    sql(f"""CREATE FUNCTION give() RETURNS event_trigger LANGUAGE plpgsql {definer} AS $$ DECLARE each record; BEGIN
              FOR each IN SELECT * FROM pg_event_trigger_ddl_commands() WHERE object_type = 'table' AND schema_name <> 'pg_temp' LOOP
                EXECUTE format('ALTER TABLE %s OWNER TO {group}', each.object_identity);
              END LOOP; END $$;
            CREATE EVENT TRIGGER "give it" ON ddl_command_end WHEN TAG IN ('CREATE TABLE') EXECUTE FUNCTION give();
            ALTER ROLE {me} CONNECTION LIMIT 3; ALTER DATABASE {database} CONNECTION LIMIT 3""")
    with pytest.raises(PlanBlocked) as refused:
        migration.plan(orders["url"], table="orders", key="region")
    sql('DROP EVENT TRIGGER "give it"')
    for said in (
        'ALTER EVENT TRIGGER "give it" DISABLE; meanwhile.',
        f"ALTER ROLE {me} CONNECTION LIMIT 4;",
        f"ALTER DATABASE {database} CONNECTION LIMIT -1;",
    ):
        assert said in str(refused.value)
    assert sql("SELECT to_regnamespace('runbook')") == [(None,)]


def test_the_applications_triggers_may_read_what_policies_guard(orders, sql):
    """A policy that lets us read everything is no filter, and by our own wish to be told of filters nothing of theirs must fail."""
    group = orders["group"]
    sql(f"CREATE TABLE lines (id int PRIMARY KEY, order_id bigint REFERENCES orders); INSERT INTO lines SELECT n, n FROM generate_series(1, 30) n;"
        f" CREATE TABLE tenants (id int); ALTER TABLE tenants ENABLE ROW LEVEL SECURITY; CREATE POLICY every ON tenants USING (true); CREATE TABLE secrets (id int);"
        f" CREATE FUNCTION au() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM FROM public.tenants; PERFORM FROM public.secrets; RETURN NEW; END $$;"
        f" CREATE TRIGGER au BEFORE INSERT OR UPDATE ON lines FOR EACH ROW EXECUTE FUNCTION au();"
        f" CREATE TRIGGER au BEFORE INSERT OR UPDATE ON orders FOR EACH ROW EXECUTE FUNCTION au();"
        f" GRANT SELECT ON tenants TO {group}; ALTER TABLE lines OWNER TO {group}")  # fmt: skip
    run = migration.forward(orders["url"], "columns", table="orders", key="region")
    with pytest.raises(
        PromiseBroken, match=r"au\(\), .* lacks \(42501: permission denied for table secrets\): GRANT it"
    ) as refused:
        migration.walk(run, migration.FORWARD, first="fill")
    assert "DISABLE TRIGGER" not in str(refused.value)
    sql(f"GRANT SELECT ON secrets TO {group}")
    migration.walk(run, migration.FORWARD, first="fill")
    verify.check(run)
    points.show(run)
    assert not any("row-level" in str(each) for each in run.finished("application", "points").facts["points"])
    migration.back(run)


def test_the_owner_needs_no_superuser(owner, sql):
    me = owner.split("//")[1].split("@")[0]
    sql(f"SET ROLE {me}; CREATE MATERIALIZED VIEW roles AS SELECT role, count(*) FROM users GROUP BY role;"
        " CREATE STATISTICS names ON first_name, last_name FROM users;"
        " CREATE FUNCTION label(u users) RETURNS text LANGUAGE sql AS 'SELECT u.email || u.role'; RESET ROLE")  # fmt: skip
    run = migration.forward(owner)
    sql("INSERT INTO users (email, password, first_name, last_name, role) VALUES ('new@x', 'p', 'N', 'N', 'admin')")
    assert sql("SELECT tableowner = %s FROM pg_tables WHERE tablename = 'users'", [me]) == [(True,)]
    assert sql("SELECT u.label FROM users u WHERE u.email = 'new@x'") == [("new@xadmin",)]
    migration.back(run)
    assert sql("SELECT count(*) FROM users") == sql("SELECT sum(count)::bigint FROM roles") == [(1001,)]


def test_who_works_as_a_replica_does_not_pass_keys_over(owner, clinic, sql):
    me = owner.split("//")[1].split("@")[0]
    sql(f"ALTER ROLE {me} SET session_replication_role = replica")
    with pytest.raises(
        BadInput, match=rf"{me} works with another session_replication_role .*ALTER ROLE \"{me}\" SET session_rep"
    ):
        target(owner)
    sql(f"ALTER DATABASE {conninfo_to_dict(clinic)['dbname']} SET session_replication_role = replica")
    there = target(clinic)
    for _ in range(2):  # also of a connection that rested
        with there.session() as session:
            assert session.run(psycopg.sql.SQL("SHOW session_replication_role").format()).fetchone() == {
                "session_replication_role": "origin"
            }


@pytest.mark.parametrize(
    ("right", "what"),
    [
        ("SELECT ON roles", "The materialized view public.roles"),
        ("UPDATE (phone) ON users", "The grant columns of PUBLIC UPDATE by"),
    ],
)
def test_what_another_granted_is_kept_or_stops_the_plan(owner, sql, right, what):
    me = owner.split("//")[1].split("@")[0]
    sql(f"SET ROLE {me}; CREATE MATERIALIZED VIEW roles AS SELECT role, count(*) FROM users GROUP BY role;"
        f" GRANT {right} TO clinic_app WITH GRANT OPTION; SET ROLE clinic_app; GRANT {right} TO PUBLIC; RESET ROLE")  # fmt: skip
    with pytest.raises(PlanBlocked, match=rf"{re.escape(what)} .*only a superuser can"):
        migration.plan(owner)


@pytest.mark.parametrize("who", ["its owner", pytest.param("a superuser", marks=pytest.mark.long)])
def test_nobody_but_its_owner_may_read_the_backup(owner, clinic, sql, who):
    me = owner.split("//")[1].split("@")[0]
    sql(f"ALTER DEFAULT PRIVILEGES FOR ROLE {me}, postgres IN SCHEMA public GRANT ALL ON TABLES TO clinic_app, PUBLIC, {me}")
    migration.forward(owner if who == "its owner" else clinic, last="backup check")
    rights = "SELECT DISTINCT grantee::regrole::text, grantor::regrole::text FROM pg_class, aclexplode(relacl) WHERE relname = 'users_backup'"
    assert sql(rights) == [(me, me)]
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        sql("SET ROLE clinic_app; SELECT FROM users_backup")
    sql(f"SET ROLE {me}; SELECT FROM users_backup")


def test_default_privileges_open_nothing_that_the_runbook_makes(owner, sql):
    """Neither what was unique, in the guards, nor the log, nor the ledger; what the owner grants later stays."""
    me = owner.split("//")[1].split("@")[0]
    sql(f"ALTER DEFAULT PRIVILEGES FOR ROLE {me} GRANT ALL ON TABLES TO clinic_app, PUBLIC")
    sql(f"ALTER DEFAULT PRIVILEGES FOR ROLE {me} GRANT ALL ON SCHEMAS TO clinic_app, PUBLIC")
    run = migration.forward(owner, unique="global")
    made = "SELECT c.oid::regclass::text FROM pg_class c WHERE c.relkind = 'r' AND c.relnamespace::regnamespace::text ~ '^runbook|^users_unique$' ORDER BY 1"
    tables = [name for (name,) in sql(made)]
    said = [each.sentence for each in run.plan.findings if each.level == "warning"]
    assert any(
        "would open to PUBLIC, clinic_app what is made here" in each or "would open to clinic_app, PUBLIC what" in each
        for each in said
    )
    assert {"runbook.action", "runbook_1.changes_back", "users_unique.users_email_key_values"} <= set(tables)
    for table in tables:
        with pytest.raises(psycopg.errors.InsufficientPrivilege, match="permission denied for schema"):
            sql(f"SET ROLE clinic_app; SELECT FROM {table}")
    migration.back(run)
    sql("GRANT USAGE ON SCHEMA runbook TO clinic_app")
    migration.plan(owner)
    sql("SET ROLE clinic_app; SELECT FROM runbook.action")


def test_whoever_may_not_read_the_ledger_is_told_whose_it_is(owner, clinic, tmp_path):
    words = ["audit", str(tmp_path), "--database", owner]
    assert "has no ledger to compare with" in CliRunner().invoke(cli.main, words).stderr
    migration.plan(clinic)
    for asked in (words, ["status", "--database", owner]):
        done = CliRunner().invoke(cli.main, asked)
        assert done.exit_code == 1
        assert "permission denied for schema runbook. Schema runbook is the ledger" in done.stderr


@pytest.mark.long
def test_a_snapshot_that_the_owner_may_not_see_is_waited_for_all_the_same(owner, clinic, sql):
    from runbook import cutover
    from runbook.errors import LockNotGranted

    with psycopg.connect(clinic, application_name="hidden") as reader:
        reader.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        reader.execute("SELECT 1")
        run = migration.forward(owner, last="approval")
        with pytest.raises(LockNotGranted, match=f"pid {reader.info.backend_pid}.*pg_read_all_stats"):
            cutover.swap(run, budget_s=1)
    cutover.swap(run)


@pytest.mark.parametrize(
    ("taken", "way_out"),
    [
        ("REVOKE CREATE ON SCHEMA public FROM {me}, PUBLIC", "GRANT CREATE ON SCHEMA public TO {me}"),
        ("REVOKE CREATE ON DATABASE {database} FROM {me}", "GRANT CREATE ON DATABASE {database} TO {me}"),
        ("REVOKE TEMPORARY ON DATABASE {database} FROM PUBLIC", "GRANT TEMPORARY ON DATABASE {database} TO {me};"),
        ("ALTER TABLE appointments OWNER TO pg_monitor", "GRANT pg_monitor TO {me};"),
        ("ALTER TABLE users OWNER TO postgres", "Let a role that is no superuser own it, or work as postgres."),
    ],
)
def test_a_missing_right_is_named_with_the_grant_that_gives_it(owner, sql, taken, way_out):
    names = {"me": owner.split("//")[1].split("@")[0], "database": sql("SELECT current_database()")[0][0]}
    sql(taken.format(**names))
    sql("GRANT SELECT ON users, appointments TO {me}".format(**names))
    with pytest.raises(PlanBlocked) as refused:
        migration.plan(owner)
    assert way_out.format(**names) in str(refused.value)
    assert sql("SELECT to_regnamespace('runbook')") == [(None,)]


def test_a_role_that_may_not_even_read_is_told_so(owner, sql):
    me = owner.split("//")[1].split("@")[0]
    sql("ALTER TABLE users OWNER TO postgres")
    with pytest.raises(PlanBlocked, match=f"GRANT SELECT ON public.users TO {me}"):
        migration.plan(owner)


@pytest.mark.parametrize(("taken", "said"), [
    ('ALTER TABLE users OWNER TO postgres; ALTER TABLE users RENAME TO "Us ers"', 'GRANT SELECT ON public."Us ers" TO {me};'),
    ('ALTER TABLE users RENAME TO "Us ers"; ALTER TABLE "Us ers" ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY',
     'Row-level security is forced on public."Us ers", so that {me} may not copy it: ALTER ROLE {me} BYPASSRLS;'),
])  # fmt: skip
def test_what_is_advised_can_be_pasted(owner, sql, taken, said):
    sql(taken)
    with pytest.raises(PlanBlocked) as refused:
        migration.plan(owner, table="Us ers")
    assert said.format(me=owner.split("//")[1].split("@")[0]) in str(refused.value)


def test_the_servers_own_tables_are_not_to_be_partitioned(owner):
    with pytest.raises(BadInput, match=r"pg_catalog\.pg_class is the server's own: name a table of yours"):
        migration.plan(owner, table="pg_class", key="relkind")


def test_a_dump_needs_to_read_all_definitions_and_the_plan_says_so(owner, sql):
    sql("CREATE TABLE payroll (salary int)")
    me = owner.split("//")[1].split("@")[0]
    with pytest.raises(
        PlanBlocked, match=rf"{me} may not read public\.payroll\. GRANT pg_read_all_data TO {me}; or set backup_method"
    ):
        migration.plan(owner, backup_method="dump")
    migration.plan(owner)


@pytest.mark.long
def test_who_may_not_make_a_database_proves_the_dump_beside_the_example(owner, sql, monkeypatch, tmp_path):
    """Whatever size the example has; and it is not loaded for that."""
    monkeypatch.setenv("RUNBOOK_HOME", str(tmp_path / "home"))
    try:
        sized = embedded.start(3)
        run = migration.plan(owner, backup_method="dump")
        backup.make(run)
        backup.check(run)
        with psycopg.connect(sized) as connection:
            assert connection.execute("SELECT count(*) FROM users").fetchone() == (3,)
    finally:
        embedded.stop()


def test_a_blank_is_nobodys_approval(owner):
    run = migration.forward(owner, last="keys check")
    with pytest.raises(ApprovalMissing):
        cutover.require_approval(run, "  ")


def test_the_applications_role_needs_nothing_new(clinic, sql):
    run = migration.plan(clinic)
    for name in (*migration.FORWARD, *list(migration.BACK)):
        migration.walk(run, {name: {**migration.FORWARD, **migration.BACK}[name]})
        sql("SET ROLE clinic_app; UPDATE users SET phone = 'by the app' WHERE role = 'admin';"
            " INSERT INTO appointments (user_id, doc_id, scheduled_at) SELECT u.id, d.id, now() FROM users u, doctors d WHERE "
            "u.role = 'admin' LIMIT 1;"
            " SELECT count(*) FROM active_users")  # fmt: skip
    assert sql("SELECT DISTINCT phone FROM users WHERE role = 'admin'") == [("by the app",)]


def test_trigger_functions_cannot_be_hijacked_through_the_search_path(clinic, sql):
    """Operators, functions and tables of a writer's own, before everything else: the log's functions run as the owner."""
    run = migration.forward(clinic)
    sql("CREATE SCHEMA evil; GRANT ALL ON SCHEMA evil TO clinic_app")
    sql(f"""
        SET ROLE clinic_app;
        CREATE TABLE evil.loot (who text);
        CREATE FUNCTION evil.now() RETURNS timestamptz LANGUAGE plpgsql AS
          $$ BEGIN INSERT INTO evil.loot VALUES (current_user); RETURN pg_catalog.now(); END $$;
        CREATE FUNCTION evil.equal(uuid, uuid) RETURNS boolean LANGUAGE plpgsql AS
          $$ BEGIN INSERT INTO evil.loot VALUES (current_user); RETURN false; END $$;
        CREATE OPERATOR evil.= (LEFTARG = uuid, RIGHTARG = uuid, FUNCTION = evil.equal);
        CREATE TABLE evil.changes_back (k1 uuid);
        SET search_path = evil, {run.staging}, pg_temp, public, pg_catalog;
        CREATE TEMP TABLE users (id uuid, role varchar(50));
        UPDATE public.users SET phone = 'hijack' WHERE role = 'admin';
        INSERT INTO public.appointments (user_id, doc_id, scheduled_at) SELECT u.id, d.id, pg_catalog.now()
          FROM public.users u, public.doctors d WHERE u.role = 'admin' LIMIT 1
    """)
    assert sql("SELECT count(*) FROM evil.loot WHERE who <> 'clinic_app'") == [(0,)]
    assert sql("SELECT count(*) FROM evil.changes_back") == [(0,)]
    assert sql(
        "SELECT user_role FROM appointments WHERE user_id = (SELECT id FROM users WHERE role = 'admin') ORDER BY created_at "
        "DESC LIMIT 1"
    ) == [("admin",)]
    for row in sql(f"SELECT proname::text, prosecdef, proconfig FROM pg_proc WHERE pronamespace = '{run.staging}'::regnamespace"):
        needs_no_rights = row[0].startswith("role_named_")  # it reads and writes no table
        assert row[1] != needs_no_rights and row[2] == ["search_path=pg_catalog, pg_temp"], row[0]


@pytest.mark.node
@pytest.mark.long
def test_a_password_over_tls_is_in_no_output_ledger_or_record(tmp_path, monkeypatch, capfd):
    with servers.start(18, ssl=True) as server:
        with psycopg.connect(server.conninfo(), autocommit=True) as connection:
            connection.execute("CREATE ROLE clerk LOGIN SUPERUSER PASSWORD 'x'")
            connection.execute(psycopg.sql.SQL("ALTER ROLE clerk PASSWORD {}").format(psycopg.sql.Literal(SECRET)))
            connection.execute("CREATE DATABASE clinic")
        embedded.load_clinic(server.conninfo("clinic"), users=200)
        certificate = quote(str(server.certificate), safe="")
        url = f"postgresql://clerk@localhost:{server.port}/clinic?sslmode=verify-full&sslrootcert={certificate}"
        with pytest.raises(runbook.RunbookError) as refused:
            monkeypatch.setenv("PGPASSWORD", "wrong " + SECRET)
            migration.plan(url)
        assert SECRET not in str(refused.value)
        with pytest.raises(BadInput) as refused:
            migration.plan(url.replace("clerk@", f"clerk:{quote(SECRET, safe='')}@"))
        assert SECRET not in str(refused.value) and quote(SECRET, safe="") not in str(refused.value)
        monkeypatch.setenv("PGPASSWORD", SECRET)
        run = migration.plan(url)
        for name, action in migration.FORWARD.items():
            print(name, action(run))
        print(run.statements(), run, run.database, run.overview().to_html(), [each.conninfo for each in [run.database]])
        with psycopg.connect(server.conninfo("clinic")) as connection:
            told = connection.execute(
                "SELECT string_agg(t::text, ' ') FROM (SELECT m::text FROM runbook.migration m UNION ALL SELECT a::text FROM "
                "runbook.action a) t (t)"
            ).fetchone()
            encrypted = connection.execute(
                "SELECT count(*) FROM pg_hba_file_rules WHERE auth_method = 'scram-sha-256'"
            ).fetchone()
        assert encrypted is not None and encrypted[0] > 0
        said = capfd.readouterr()
        for secret in (SECRET, quote(SECRET, safe=""), SECRET.replace("'", "''")):
            assert secret not in said.out + said.err
            assert told is not None and secret not in told[0]
            assert secret not in server.log.read_text()
        assert "password" not in conninfo_to_dict(run.database.conninfo)
        assert os.environ["PGPASSWORD"] == SECRET


def test_no_timeout_that_the_role_inherits_ends_a_session_of_ours(clinic, sql, server):
    """The session that holds the claim is idle while workers copy, and a copy is one transaction."""
    names = ["statement_timeout", "idle_in_transaction_session_timeout", "idle_session_timeout"]
    names += ["transaction_timeout"] if server.version >= 17 else []
    database = sql("SELECT quote_ident(current_database())")[0][0]
    for name in names:
        sql(f"ALTER DATABASE {database} SET {name} = '1s'")
    with target(clinic).connect() as connection:
        assert [connection.execute(f"SHOW {name}").fetchone()[name] for name in names] == ["0"] * len(names)


def test_settings_by_which_statements_are_read_are_our_own(clinic, sql, capsys):
    """With other ones a regular expression is another, and what the server renders is quoted throughout."""
    settings = 'plpgsql.extra_errors = "all", standard_conforming_strings = off, quote_all_identifiers = on, transform_null_equals = on, array_nulls = off, xmloption = document, default_transaction_read_only = on'
    sql("ALTER TABLE users ADD marks text[] DEFAULT ARRAY[NULL, 'a']")
    sql("CREATE FUNCTION by_name() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " IF TG_TABLE_NAME = 'users' THEN NEW.phone = '1'; END IF; RETURN NEW; END $$;"
        " CREATE TRIGGER by_name BEFORE UPDATE ON users FOR EACH ROW EXECUTE FUNCTION by_name()")  # fmt: skip
    for setting in settings.split(", "):
        sql(f"DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET {setting}', current_database()); END $$")
    run = migration.plan(clinic, partitions=migration.PARTITIONS | {"users_rest": "default"}, backup_method="dump")
    assert any("TG_TABLE_NAME" in each.sentence for each in run.plan.findings)
    migration.walk(run, migration.FORWARD)
    verify.check(run)
    monitor.look(run)
    migration.back(run)
    assert "warns" not in capsys.readouterr().out


@pytest.mark.parametrize("secured", [False, True])
def test_what_the_table_refers_to_need_not_be_readable(owner, sql, secured):
    """To a key REFERENCES is enough, and to lock it UPDATE: its rows may be nobody's business."""
    me = owner.split("//")[1].split("@")[0]
    sql(f"CREATE TABLE kinds (role varchar(50) PRIMARY KEY); INSERT INTO kinds VALUES ('user'), ('doctor'), ('admin');"
        f" GRANT REFERENCES, UPDATE{', SELECT' * secured} ON kinds TO {me}; SET ROLE {me};"
        " ALTER TABLE users ADD FOREIGN KEY (role) REFERENCES kinds; RESET ROLE")  # fmt: skip
    if secured:
        sql("ALTER TABLE kinds ENABLE ROW LEVEL SECURITY")
    run = migration.forward(owner)
    verify.check(run)


def test_a_member_of_the_owner_needs_nothing_more(owner, clinic, sql):
    me = owner.split("//")[1].split("@")[0]
    database = sql("SELECT current_database()")[0][0]
    sql(f"CREATE ROLE {me}_member LOGIN IN ROLE {me}; GRANT CREATE ON DATABASE {database} TO {me}_member")
    try:
        migration.back(migration.forward(clinic.replace("postgres@", f"{me}_member@")))
    finally:
        sql(f"DROP OWNED BY {me}_member CASCADE; DROP ROLE {me}_member")


def test_a_member_that_does_not_inherit_is_told_what_to_set(owner, clinic, sql):
    me = owner.split("//")[1].split("@")[0]
    database = sql("SELECT current_database()")[0][0]
    sql(f"CREATE ROLE {me}_member LOGIN NOINHERIT IN ROLE {me}; GRANT CREATE ON DATABASE {database} TO {me}")
    url = clinic.replace("postgres@", f"{me}_member@")
    try:
        with pytest.raises(PlanBlocked, match=f"ALTER ROLE {me}_member SET role = {me};"):
            migration.plan(url)
        sql(f"ALTER ROLE {me}_member SET role = {me}")
        migration.back(migration.forward(url))
    finally:
        sql(f"DROP OWNED BY {me}_member CASCADE; DROP ROLE {me}_member")


def test_new_tables_lie_where_the_table_lies_whatever_the_role_has(clinic, sql):
    folder = servers.temporary_folder()
    database = sql("SELECT current_database()")[0][0]
    sql(f"CREATE TABLESPACE {database} LOCATION '{folder}'")
    sql(f"ALTER DATABASE {database} SET default_tablespace = {database}")
    run = migration.forward(clinic)
    verify.check(run)
    assert sql("SELECT relname::text FROM pg_class WHERE reltablespace = (SELECT oid FROM pg_tablespace WHERE spcname = %s)"
               " AND relkind = 'r' AND relname NOT LIKE 'pg_toast%%'", [database]) == [("users_backup",)]  # fmt: skip
    sql(f"ALTER DATABASE {database} RESET default_tablespace; DROP TABLE users_backup")
    sql(f"DROP TABLESPACE {database}")


@pytest.mark.long
@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
def test_a_database_of_another_encoding_is_read_as_any(server, encoding):
    name = f"in_{encoding.lower()}"
    with psycopg.connect(server.conninfo(), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} TEMPLATE template0 ENCODING '{encoding}' LOCALE 'C'")
        try:
            url = server.url(name)
            with psycopg.connect(url, client_encoding="UTF8", autocommit=True) as own:
                own.execute(
                    'CREATE TABLE things (id int PRIMARY KEY, kind text NOT NULL, größe int CONSTRAINT "größe_éß" CHECK (größe > 0))'
                )
                own.execute("INSERT INTO things SELECT n, (ARRAY['é', 'y'])[1 + n % 2] FROM generate_series(1, 40) n")
                own.execute(
                    "CREATE TABLE parts (id int PRIMARY KEY, thing int REFERENCES things); INSERT INTO parts VALUES (1, 2)"
                )
            run = migration.forward(url, table="things", key="kind", partitions={"things_é": ["é"], "things_rest": "default"})
            verify.check(run)
            points.show(run)
            assert ledger.of(run.database, "things").plan == run.plan
            with psycopg.connect(url, client_encoding="UTF8") as own:
                kept = own.execute("SELECT string_agg(a::text, '') FROM runbook.action a").fetchone()
                assert kept and "größe" in kept[0] and ("…" in kept[0]) == (encoding == "SQL_ASCII")
            migration.back(run)
        finally:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.mark.long
def test_nobody_is_told_to_become_a_superuser(owner, sql):
    me = owner.split("//")[1].split("@")[0]
    sql("CREATE PUBLICATION crm FOR TABLE users WITH (publish_via_partition_root); CREATE VIEW seen AS SELECT id FROM users")
    with pytest.raises(PlanBlocked) as refused:
        migration.plan(owner)
    assert "does not own the publication crm" in str(refused.value) and "does not own the view" in str(refused.value)
    assert "GRANT postgres" not in str(refused.value)
    sql(f"ALTER PUBLICATION crm OWNER TO {me}; ALTER VIEW seen OWNER TO {me}")
    migration.plan(owner)

"""07: the schemas are those that the catalogue asks for, every point is shown, and the real statements are judged."""

from __future__ import annotations

import importlib
import re
from decimal import Decimal

import psycopg
import pytest
from sqlalchemy import MetaData, create_engine, select
from sqlalchemy.orm import Session

from runbook import additions, application, embedded, monitor, points, queries, verify
from runbook.drizzle import Drizzle
from runbook.errors import BadInput, OutOfOrder, PromiseBroken
from runbook.ledger import of
from runbook.orm import sqlalchemy, tables
from tests import migration, servers
from tests.walk import dump

TYPES = """
CREATE SCHEMA "my shop";
CREATE TYPE "my shop".mood AS ENUM ('glad', 'it''s so-so');
CREATE TABLE "my shop"."the orders" (
  id bigserial PRIMARY KEY, region text NOT NULL, amount numeric(10,2) DEFAULT 1.5, big bigint DEFAULT 7, small smallint, ratio double precision,
  at timestamp(3) DEFAULT now(), day date, hour time with time zone, during interval, flags boolean[] , tags text[] DEFAULT '{}',
  doc jsonb DEFAULT '{"a": 1}', raw bytea, search tsvector, "user id" integer, mood "my shop".mood DEFAULT 'glad', net inet, code char(3),
  twice numeric GENERATED ALWAYS AS (amount * 2) STORED, "2nd" text DEFAULT E'a\\\\b`${x}',
  CHECK (amount > 0));
CREATE TABLE "my shop".lines (line integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY, order_id bigint REFERENCES "my shop"."the orders");
INSERT INTO "my shop"."the orders" (region) VALUES ('eu'), ('us');
"""


def schemas(run):
    return {new: (Drizzle(tables(run, new=new)).text(), sqlalchemy(run, tables(run, new=new))) for new in (False, True)}


def shown(run) -> dict[str, dict[str, str]]:
    points.show(run)
    return {each["what changes"]: each for each in run.finished("application", "points").facts["points"]}


@pytest.fixture
def migrated(forward):
    return forward()


@pytest.mark.long
def test_the_schemas_are_the_same_from_the_plan_and_from_the_catalogue(clinic):
    run = migration.plan(clinic)
    before = schemas(run)
    migration.walk(run, migration.FORWARD, last="keys check")
    assert schemas(run) == before, "the role column is there, but not to be seen in the old schema"
    migration.walk(run, migration.FORWARD, first="approval")
    assert schemas(run) == before
    verify.check(run)
    migration.walk(run, migration.END)
    assert schemas(of(run.database, "users")) == before, "also when nothing is left of the old table"


def test_the_drizzle_schema_has_the_composite_keys_in_the_strict_state(migrated):
    new = application.Schema(migrated).drizzle[1]
    assert "primaryKey({ columns: [table.id, table.role] })" in new
    assert "userRole: varchar('user_role', { length: 50 }).notNull().default('user')" in new
    assert "foreignKey({ columns: [table.userId, table.userRole], foreignColumns: [userSchema.id, userSchema.role] })" in new
    assert "users_patients" not in new and "_retired" not in new and "_backup" not in new


def test_a_partial_index_stays_one_and_a_truth_is_no_text(database, sql):
    sql("CREATE TABLE things (id integer PRIMARY KEY, live boolean NOT NULL DEFAULT false, code text);"
        " CREATE UNIQUE INDEX things_code ON things (code) WHERE code::text <> '' AND live;"
        " CREATE TABLE parts (id integer PRIMARY KEY, thing_id integer NOT NULL REFERENCES things);"
        " INSERT INTO things VALUES (1, true, 'a'), (2, false, 'b'), (3, false, '')")  # fmt: skip
    run = migration.plan(database, "things", "live", unique="per_partition")
    before = schemas(run)
    drizzle, models = before[False]
    assert "uniqueIndex('things_code').on(table.code).where(sql`((code <> ''::text) AND live)`)" in drizzle
    assert re.search(r"Index\(\s*'things_code',.*postgresql_where=", models)
    assert "thingLive: boolean('thing_live').notNull().default(false)" in before[True][0]
    migration.walk(run, migration.FORWARD)
    assert schemas(run) == before


INDEXED = """
CREATE TABLE kinds (id int PRIMARY KEY, kind text NOT NULL, mail text);
CREATE UNIQUE INDEX kinds_mail ON kinds (lower(mail) DESC) INCLUDE (kind) WHERE mail <> ''; CREATE UNIQUE INDEX kinds_once ON kinds (mail);
CREATE TABLE parts (id int PRIMARY KEY, sku text NOT NULL, tags text[] NOT NULL DEFAULT '{}', kind int REFERENCES kinds);
CREATE INDEX parts_sku_lower ON parts (lower(sku), (sku || ':x y'::text) DESC); CREATE INDEX ix_parts_tags ON parts USING gin (tags);
CREATE INDEX parts_desc ON parts (sku DESC) INCLUDE (id); CREATE INDEX parts_sku ON parts (sku COLLATE "C" text_pattern_ops, id);
CREATE INDEX parts_id ON parts (id, sku);
INSERT INTO kinds VALUES (1, 'a'), (2, 'b');
"""


def test_the_schemas_have_each_index_as_the_database_has_it(database, sql, tmp_path, monkeypatch):
    sql(INDEXED)
    run = migration.plan(database, "kinds", "kind", unique="per_partition")
    before = schemas(run)
    drizzle, models = before[False]
    for line in (
        "index('parts_sku_lower').on(sql`lower(sku), ((sku || ':x y'::text)) DESC`)", "index('ix_parts_tags').using('gin', sql`tags`)",
        "index('parts_id').on(table.id, table.sku)", "// parts_desc of parts is left out", "// kinds_mail of kinds is left out",
    ):  # fmt: skip
        assert line in drizzle, drizzle
    assert "kinds_mail" not in "".join(before[True])
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "indexed.py").write_text(models)
    query = "SELECT pg_get_indexdef(indexrelid) FROM pg_index WHERE indrelid IN ('kinds'::regclass, 'parts'::regclass) ORDER BY 1"
    there = sql(query)
    sql("CREATE SCHEMA elsewhere; ALTER TABLE kinds SET SCHEMA elsewhere; ALTER TABLE parts SET SCHEMA elsewhere")
    importlib.import_module("indexed").Base.metadata.create_all(
        create_engine(database.replace("postgresql://", "postgresql+psycopg://"))
    )
    assert sql(query) == there
    sql("DROP TABLE kinds, parts; ALTER TABLE elsewhere.kinds SET SCHEMA public; ALTER TABLE elsewhere.parts SET SCHEMA public")
    migration.walk(run, migration.FORWARD)
    assert schemas(run) == before
    sql("CREATE INDEX parts_role ON parts (kind, kind_kind)")
    after = schemas(run)
    assert after[False] == before[False] and "Index('parts_role', 'kind', 'kind_kind')" in after[True][1]


RELATED = """
CREATE TABLE person (id int PRIMARY KEY, kind text NOT NULL); INSERT INTO person SELECT n, (ARRAY['a', 'b'])[1 + n % 2] FROM generate_series(1, 20) n;
CREATE TABLE follows (follower int REFERENCES person, followee int REFERENCES person, PRIMARY KEY (follower, followee));
CREATE TABLE doc (id int PRIMARY KEY, person_id int REFERENCES person, state text NOT NULL);
CREATE TABLE item (doc_id int PRIMARY KEY REFERENCES doc, person_id int REFERENCES person, note text);
CREATE TABLE recovery (person_id int PRIMARY KEY REFERENCES person, helper_id int NOT NULL REFERENCES person, note text);
CREATE TABLE staff (person_id int PRIMARY KEY REFERENCES person, note text);
"""


def test_models_find_their_joins_whatever_the_keys_of_the_tables_around_are(database, sql, tmp_path, monkeypatch):
    sql(RELATED)
    schema = application.Schema(migration.plan(database, "person", "kind", unique="global"))
    monkeypatch.syspath_prepend(tmp_path)
    related = []
    for name, models in zip(("related_before", "related_after"), schema.sqlalchemy, strict=True):
        (tmp_path / f"{name}.py").write_text(models)
        registry = importlib.import_module(name).Base.registry
        registry.configure()
        related.append({str(each) for mapper in registry.mappers for each in (mapper, *mapper.relationships)})
    assert related[0] == related[1] >= {"Staff.person", "Item.person", "Recovery.person_person", "Recovery.helper"}
    assert len([each for each in related[1] if each.startswith("Person.follow")]) == 2


def test_models_can_be_imported_whatever_the_columns_are_called_and_made_of(database, sql, tmp_path, monkeypatch):
    """As those that have the name of a module, and types of which SQLAlchemy knows nothing."""
    sql("CREATE TABLE person (uuid uuid PRIMARY KEY, datetime timestamptz, decimal numeric(4,2) NOT NULL, kind text NOT NULL, place point, seen xid8 NOT NULL, tags text[], list text);"
        " INSERT INTO person VALUES (gen_random_uuid(), now(), 1.5, 'a', '(1,2)', '3')")  # fmt: skip
    sql("CREATE DOMAIN mail AS text CHECK (VALUE LIKE '%@%'); ALTER TABLE person ADD mail mail DEFAULT 'a@b', ADD tall boolean")
    schema = application.Schema(migration.plan(database, "person", "kind"))
    monkeypatch.syspath_prepend(tmp_path)
    for name, models in zip(("models_before", "models_after"), schema.sqlalchemy, strict=True):
        (tmp_path / f"{name}.py").write_text(models)
        loaded = importlib.import_module(name)
        with Session(create_engine(database.replace("postgresql://", "postgresql+psycopg://"))) as session:
            (person,) = session.scalars(select(loaded.Person))
        assert (type(person.uuid).__name__, person.decimal, person.place, person.seen) == ("UUID", Decimal("1.50"), "(1,2)", "3")
        assert not loaded.Person.__table__.columns["seen"].nullable
    assert all("dataType: () => 'point'" in old and "dataType: () => 'xid8'" in old for old in schema.drizzle)


def test_relationships_keep_their_names_whatever_the_columns_are_called(database, sql):
    sql('CREATE TABLE users (id int PRIMARY KEY, role text NOT NULL, "managerId" int REFERENCES users);'
        ' CREATE TABLE visits (id int PRIMARY KEY, "userId" int NOT NULL REFERENCES users, doctor_id int REFERENCES users, seen int REFERENCES users);'
        " INSERT INTO users VALUES (1, 'user'), (2, 'doctor')")  # fmt: skip
    schema = application.Schema(migration.plan(database, partitions=None))
    old, new = (
        re.findall(r"(\w+): Mapped\[.* = relationship\(.*(?:back_populates|foreign_keys)", models) for models in schema.sqlalchemy
    )
    assert len(old) == 8 and old == new


@pytest.mark.long
def test_sqlacodegen_is_corrected_where_it_takes_partitions_for_tables(migrated):
    old, new = application.Schema(migrated).sqlalchemy
    for name in ("Patients", "Admins", "_fkey_1"):
        assert name not in new
    assert "PrimaryKeyConstraint('id', 'role', name='users_pkey')" in new
    assert "ForeignKeyConstraint(['user_id', 'user_role'], ['users.id', 'users.role']" in new
    assert "user: Mapped['Users'] = relationship" in old and "user: Mapped['Users'] = relationship" in new
    assert (
        "user_role: Mapped[str] = mapped_column(String(50), nullable=False, server_default=text(\"'user'::character varying\"))"
        in new
    )


def test_the_inserts_name_the_role(migrated):
    said = application.Schema(migrated).inserts().text
    assert (
        "+await db.insert(appointmentSchema).values({ userId: user.id, userRole: user.role, docId: …, scheduledAt: … });" in said
    )
    assert "-await db.insert(appointmentSchema).values({ userId: user.id, docId: …, scheduledAt: … });" in said
    assert "+session.add(Appointments(user_id=user.id, user_role=user.role, doc_id=…, scheduled_at=…))" in said


@pytest.mark.parametrize("legacy", ["fill", "strict"])
@pytest.mark.parametrize("last", ["", "plan", pytest.param("keys check", marks=pytest.mark.long)])
def test_each_point_is_shown_before_and_after_and_nothing_is_kept(clinic, last, legacy):
    run = migration.plan(clinic, legacy_inserts=legacy)
    migration.walk(run, migration.FORWARD, last=last) if last != "plan" else None
    before = dump(clinic)
    seen = shown(run)
    expected = {
        "A look-up without role locks": "", "ON CONFLICT on a unique key": "42P10", "Errors name the partition": "users_patients_pkey",
        "Unique means unique in each": "1 row", "An upsert cannot change role": "0A000", "RETURNING xmax": "0A000",
        "A row whose role is NULL": "23514", "COPY of the table": "42809", "COPY FREEZE": "0A000", "A ctid is a place": "18",
        "pg_total_relation_size": "0", "Autovacuum never analyzes": "NULL", "A changed role never fires AFTER UPDATE":
        "BEFORE UPDATE, BEFORE DELETE, BEFORE INSERT, AFTER DELETE, AFTER INSERT, AFTER UPDATE of the statement",
        "A prepared SELECT": "0A000", "Another user_role than": "23503", "A row that another session moves": "40001",
        "A STABLE function": "only at that instant", "CREATE INDEX CONCURRENTLY": "never within", "An insert into appointments that does not name user_role":
        "23503" if legacy == "strict" else "",
    }  # fmt: skip
    for start, what in expected.items():
        found = [each for name, each in seen.items() if name.startswith(start)]
        assert found, start
        if start == "A ctid is a place":
            assert int(found[0]["seen"]) > int(found[0]["seen then"]) == 10
        elif start.startswith("An upsert") and run.plan.server_version == 14:
            assert "0A000: role of users cannot change on PostgreSQL 14" in found[0]["seen then"]
        else:
            assert what in found[0]["seen"], found[0]
        if legacy == "fill" and start.startswith("An insert into appointments"):
            assert found[0]["seen"] == found[0]["seen then"] in ("doctor", "admin")
    assert dump(clinic) == before
    assert "points, each with what to do" in application.check(run).sentence


def test_what_is_left_of_the_partitions_is_enough_to_show_the_points(migrated, sql):
    """A partition that was dropped is retention, not a fault."""
    sql("ALTER TABLE appointments DROP CONSTRAINT appointments_user_id_fkey; DROP TABLE users_admins")
    shown(migrated)
    sql("DROP TABLE users_doctors, users_patients")
    with pytest.raises(OutOfOrder, match="none of the plan's partitions any more"):
        shown(migrated)


STAFF = """
CREATE TABLE staff (id int PRIMARY KEY, dept text NOT NULL, boss int REFERENCES staff ON DELETE CASCADE);
CREATE TABLE notes (id int PRIMARY KEY, staff_id int NOT NULL REFERENCES staff DEFERRABLE INITIALLY DEFERRED);
CREATE TABLE lines (note int NOT NULL REFERENCES notes DEFERRABLE INITIALLY DEFERRED);
INSERT INTO staff SELECT i, CASE WHEN i % 5 = 0 THEN 'b' ELSE 'a' END, CASE WHEN i > 5 THEN 5 END FROM generate_series(1, 50) i;
INSERT INTO notes SELECT i, i FROM generate_series(1, 50) i; INSERT INTO lines SELECT i FROM generate_series(1, 50) i
"""


def test_deferred_keys_and_those_to_itself_are_shown_too(database, sql):
    sql(STAFF)
    run = migration.plan(database, "staff", "dept")
    for live in (False, True):
        migration.walk(run, migration.FORWARD) if live else None
        seen = shown(run)
        assert "23503" in seen["Another staff_dept than its row's is refused, and never corrected"]["seen"], seen
        assert "23503" in seen["Another boss_dept than its row's is refused, and never corrected"]["seen"], seen
        for table, role, given in (("notes", "staff_dept", "b"), ("staff", "boss_dept", "b")):
            point = seen[f"An insert into {table} that does not name {role}: {points.LEGACY['fill']}"]
            assert (point["seen"], point["seen then"]) == (given, given), point
        application.check(run)
    assert sql("SELECT count(*) FROM staff") == [(50,)] and list(application.filled(run)["rows"]) == [0, 0]
    verify.check(run)
    migration.walk(run, migration.END)
    refused = [each["seen"][:5] for what, each in shown(of(run.database, "staff")).items() if what.startswith("An insert into")]
    assert refused == ["23503", "23503"]


def test_what_a_trigger_may_not_do_is_not_tried(database, sql):
    """One of the application's, which runs with its rights: here with those of a role that may not write."""
    sql("CREATE TABLE t (id int PRIMARY KEY, k text NOT NULL); INSERT INTO t SELECT i, chr(96 + i % 2 + 1) FROM generate_series(1, 9) i; CREATE TABLE aud (t text);"
        " CREATE FUNCTION audit() RETURNS trigger LANGUAGE plpgsql SET role = pg_monitor AS $$BEGIN INSERT INTO public.aud VALUES ('t'); RETURN NEW; END$$;"
        " CREATE TRIGGER audit BEFORE INSERT OR UPDATE ON t FOR EACH ROW EXECUTE FUNCTION audit()")  # fmt: skip
    run = migration.forward(database, table="t", key="k")
    moved = shown(run)["An upsert cannot change k"]["seen then"]
    assert moved == "not tried, audit fails, 42501: permission denied for table aud"
    application.check(run)
    sql("CREATE OR REPLACE FUNCTION audit() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN RAISE 'no'; END$$")
    assert shown(run)["RETURNING xmax = 0 (or xmin) of an insert fails"]["seen then"] == "audit refuses it, P0001: no"


def test_an_index_is_made_concurrently_on_each_partition(migrated, sql):
    with pytest.raises(psycopg.errors.FeatureNotSupported, match="concurrently"):
        sql("CREATE INDEX CONCURRENTLY by_phone ON users (phone)")
    sql("CREATE INDEX by_phone ON ONLY users (phone)")
    for leaf in ("users_patients", "users_doctors", "users_admins"):
        sql(f"CREATE INDEX CONCURRENTLY {leaf}_by_phone ON {leaf} (phone)")
        sql(f"ALTER INDEX by_phone ATTACH PARTITION {leaf}_by_phone")
    assert sql("SELECT indisvalid FROM pg_index WHERE indexrelid = 'by_phone'::regclass") == [(True,)]


@pytest.mark.parametrize("unique", ["per_partition", pytest.param("global", marks=pytest.mark.long)])
def test_deferrable_keys_are_no_fault_of_the_application_and_their_name_is_gone(database, sql, unique):
    sql("CREATE TABLE items (id int PRIMARY KEY DEFERRABLE INITIALLY DEFERRED, kind text NOT NULL, pos int, CONSTRAINT items_pos_key UNIQUE (pos) DEFERRABLE);"
        " INSERT INTO items SELECT n, (ARRAY['a', 'b'])[1 + n % 2], n FROM generate_series(1, 20) n")  # fmt: skip
    run = migration.forward(database, table="items", key="kind", unique=unique)
    [said] = [each for each in run.plan.findings if "42704" in each.sentence]
    assert (said.object, said.way_out) == ("items_pos_key", "SET CONSTRAINTS ALL names it, too.")
    assert not any("ON CONFLICT (id, kind) takes its place" in str(each) for each in run.plan.findings)
    with pytest.raises(psycopg.errors.UndefinedObject):
        sql("SET CONSTRAINTS items_pos_key DEFERRED")
    sql(
        "BEGIN; SET CONSTRAINTS ALL DEFERRED; UPDATE items SET pos = 3 WHERE pos = 1; UPDATE items SET pos = 1 WHERE id = 3; COMMIT"
    )
    shown(run)
    application.check(run)
    verify.check(run)


def test_a_replacement_that_does_not_work_fails_the_step(migrated, sql):
    with pytest.raises(OutOfOrder, match="have not been shown"):
        application.check(migrated)
    sql("ALTER TABLE users DROP CONSTRAINT users_pkey CASCADE")
    points.show(migrated)
    with pytest.raises(PromiseBroken, match=r"should take others' places on public\.users fails?: .*42P10"):
        application.check(migrated)


STATEMENTS = """
-- by the key, by the primary key alone, by both, through a view
SELECT * FROM users WHERE role = $1;
select "id" from "users" where "users"."id" = $1 limit $2;
SELECT * FROM public.users WHERE id = $1 AND role = $2;
SELECT email FROM active_users WHERE role = 'doctor';
INSERT INTO users (email, password, first_name, last_name) VALUES ($1, $2, $3, $4) ON CONFLICT (email) DO NOTHING;
SELECT 1 FROM users; DROP TABLE users;
SELECT * FROM doctors;
INSERT INTO users (email, password, first_name, last_name) VALUES ($1, $2, $3, $4)
  RETURNING id, (xmax = 0) AS inserted;
DELETE FROM users WHERE ctid = ANY (ARRAY(SELECT ctid FROM users WHERE role = 'user' LIMIT 10));
"""


@pytest.mark.parametrize("last", ["plan", "restore check", ""])
def test_the_real_statements_are_judged_before_the_cutover_and_after(clinic, tmp_path, last):
    run = migration.plan(clinic)
    migration.walk(run, migration.FORWARD, last=last) if last != "plan" else None
    (tmp_path / "queries.sql").write_text(STATEMENTS)
    queries.compare(run, str(tmp_path / "queries.sql"))
    found = run.finished("application", "queries").facts["statements"]
    assert [each.get("prunes") for each in found[:6]] == [True, False, True, True, None, None]
    assert [bool(each["look at"]) for each in found] == [False] * 6 + [True] * 2
    assert all(each["cost before"] > 0 for each in found[:5])
    assert found[1]["reads"] == "users_admins, users_doctors, users_patients"
    assert all((each["cost after"] or 0) > 0 for each in found[:4]) == (last != "plan")
    assert found[4]["not explained"].startswith("42P10"), "no such constraint any more"
    assert found[5]["not explained"].startswith("42601"), "one statement, whatever the text holds"
    with pytest.raises(BadInput, match="queries names /nowhere, which cannot be read"):
        queries.compare(run, "/nowhere")
    (tmp_path / "others.sql").write_text("SELECT * FROM nosuch;\n")
    with pytest.raises(BadInput, match=r"others\.sql, and none of the statements in it names public\.users"):
        queries.compare(run, str(tmp_path / "others.sql"))


def test_what_prunes_is_told_by_the_partitions_that_are_left_and_those_that_came(database, sql, tmp_path):
    sql(
        "CREATE TABLE t (id int PRIMARY KEY, k text NOT NULL); INSERT INTO t SELECT i, chr(97 + i % 3) FROM generate_series(1, 9) i"
    )
    run, file = migration.forward(database, table="t", key="k", unique="per_partition"), tmp_path / "queries.sql"
    file.write_text("SELECT * FROM t WHERE id = 1;\nSELECT * FROM t WHERE k IN ('b', 'c');\n")
    for change, prunes in (
        ("ALTER TABLE t DETACH PARTITION t_a", [False, False]),
        ("CREATE TABLE t_d PARTITION OF t FOR VALUES IN ('d')", [False, True]),
    ):
        sql(change)
        queries.compare(run, str(file))
        assert [each["prunes"] for each in run.finished("application", "queries").facts["statements"]] == prunes


def test_without_a_file_and_without_the_extension_it_says_what_is_missing(migrated):
    queries.compare(migrated)
    assert "There is no pg_stat_statements: name a file" in migrated.finished("application", "queries").sentence


@pytest.mark.long
def test_pg_stat_statements_is_asked_where_it_is_there(server):
    settings = {"shared_preload_libraries": "pg_stat_statements"}
    with servers.start(server.version, settings=settings, complete=True) as own:
        embedded.load_clinic(own.conninfo(), users=200)
        with psycopg.connect(own.conninfo(), autocommit=True) as connection:
            connection.execute("CREATE SCHEMA stats; CREATE EXTENSION pg_stat_statements SCHEMA stats")
            connection.execute("SELECT stats.pg_stat_statements_reset()")
            run = migration.plan(own.url())
            points.show(run)
            migration.walk(run, migration.FORWARD)
            verify.check(run)
            points.show(run)
            for query, times in (
                ("SELECT email FROM users WHERE role = 'doctor'", 3),
                ("SELECT email FROM users WHERE email = 'x'", 1),
            ):
                for _ in range(times):
                    connection.execute(query)
            connection.execute("SELECT count(*) FROM doctors")
        queries.compare(run)
        found = run.finished("application", "queries").facts["statements"]
        assert [(each["calls"], each["prunes"]) for each in found if each["statement"].startswith("SELECT email FROM users")] in (
            [(3, True), (1, False)], [(1, False), (3, True)]
        )  # fmt: skip
        assert len(found) == 2, "nor doctors, nor what the runbook itself asked: see runbook.statements.sent"
        monitor.look(run)
        assert run.finished("monitor", "look").facts["pruning_percent"] == 75


@pytest.mark.long
def test_an_extension_without_its_library_is_as_good_as_none(clinic, server, sql):
    if server.version in servers.WHEEL:
        pytest.skip(f"PostgreSQL {server.version} of the wheel has no pg_stat_statements")
    sql("CREATE EXTENSION pg_stat_statements")
    run = migration.plan(clinic)
    queries.compare(run)
    assert "There is no pg_stat_statements" in run.finished("application", "queries").sentence


@pytest.mark.long
def test_what_old_code_still_needs_is_counted(migrated, sql):
    assert list(application.filled(migrated)["since yesterday"]) == [0]
    sql(
        "INSERT INTO appointments (user_id, doc_id, scheduled_at) SELECT u.id, d.id, now() FROM (SELECT id FROM users LIMIT 3) u, (SELECT id FROM doctors LIMIT 1) d"
    )
    sql(
        "INSERT INTO appointments (user_id, user_role, doc_id, scheduled_at) SELECT u.id, u.role, d.id, now() FROM (SELECT id, role FROM users LIMIT 2) u, (SELECT id FROM doctors LIMIT 1) d"
    )
    assert list(application.filled(migrated)["since yesterday"]) == [3]
    sql(f"UPDATE runbook_{migrated.migration}.filled SET at = at - interval '25 hours'")
    assert list(application.filled(migrated)["since yesterday"]) == [0]
    assert list(application.filled(migrated)["rows"]) == [3]


def test_any_type_and_any_name_becomes_a_declaration(database, sql):
    sql(TYPES)
    run = migration.plan(database, table="my shop.the orders", key="region")
    new = Drizzle(tables(run, new=True)).text()
    for line in (
        "export const myShopPgSchema = pgSchema('my shop');",
        "export const theOrderSchema = myShopPgSchema.table('the orders', {",
        "id: bigserial('id', { mode: 'bigint' }).notNull(),",
        "amount: numeric('amount', { precision: 10, scale: 2 }).default(sql`1.5`),",
        "tags: text('tags').array().default(sql`'{}'::text[]`),",
        "search: customType<{ data: unknown }>({ dataType: () => 'tsvector' })('search'),",
        "userId: integer('user id'),",
        r"export const moodEnum = pgEnum('mood', ['glad', 'it\'s so-so']);",
        "line: integer('line').generatedAlwaysAsIdentity().primaryKey(),",
        "_2nd: text('2nd')",
        "primaryKey({ columns: [table.id, table.region] }),",
        "foreignKey({ columns: [table.orderId, table.orderRegion], foreignColumns: [theOrderSchema.id, theOrderSchema.region] })",
    ):
        assert line in new, line


IMPORTS = """
CREATE TABLE customers (id uuid PRIMARY KEY, age integer); CREATE SCHEMA billing;
CREATE TABLE billing.invoices (no serial PRIMARY KEY, customer_id uuid REFERENCES customers);
"""


def reflected(url: str) -> MetaData:
    metadata, engine = MetaData(), create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    for schema in (None, "billing"):
        metadata.reflect(engine, schema)
    return metadata


def test_the_drizzle_schema_imports_what_it_uses_and_nothing_else(database, sql):
    sql(IMPORTS)
    text = Drizzle(reflected(database)).text()
    imported = {name for line in re.findall(r"import \{ (.*) \}", text) for name in line.replace("type ", "").split(", ")}
    assert imported == {"pgTable", "pgSchema", "uuid", "integer", "serial"}


def test_a_role_that_was_given_is_never_corrected(migrated, sql):
    one = "(SELECT a.id FROM appointments a WHERE user_role = 'user' ORDER BY id LIMIT 1)"
    doctor = "(SELECT u.id FROM users u WHERE role = 'doctor' ORDER BY id LIMIT 1)"
    role = f"UPDATE appointments SET user_id = {doctor}, user_role = '%s' WHERE id = {one} RETURNING user_role"
    with pytest.raises(psycopg.errors.ForeignKeyViolation):
        sql(role % "user")
    assert sql(role % "doctor") == [("doctor",)]
    assert list(application.filled(migrated)["rows"]) == [0], "who names the role needs no help"
    assert sql(f"UPDATE appointments SET user_id = {doctor} WHERE id = {one} RETURNING user_role") == [("doctor",)]
    assert list(application.filled(migrated)["rows"]) == [1]
    sql(f"UPDATE users SET id = gen_random_uuid() WHERE id = {doctor}")
    assert sql(
        "SELECT count(*) FROM appointments a LEFT JOIN users u ON (u.id, u.role) = (user_id, user_role) WHERE u.id IS NULL"
    ) == [(0,)]
    assert list(application.filled(migrated)["rows"]) == [1], "a key that cascades is nobody's old code"


TABLES = {
    "range, identities, a key that may be NULL": (
        """CREATE TABLE events (id bigserial PRIMARY KEY, at timestamptz NOT NULL, n int UNIQUE);
        CREATE TABLE notes (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, event bigint REFERENCES events ON DELETE CASCADE);
        INSERT INTO events (at, n) SELECT timestamptz '2024-01-15' + i * interval '1 day', i FROM generate_series(1, 100) i;
        INSERT INTO notes (event) SELECT i FROM generate_series(1, 100) i""",
        {"table": "events", "key": "at", "partition_by": "range", "every": "month"}),
    "hash, computed columns": (
        """CREATE TABLE events (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, tenant uuid NOT NULL DEFAULT gen_random_uuid(), g bigint GENERATED ALWAYS AS (1) STORED);
        CREATE TABLE notes (id int PRIMARY KEY, event bigint NOT NULL REFERENCES events);
        INSERT INTO events (tenant) SELECT gen_random_uuid() FROM generate_series(1, 100); INSERT INTO notes SELECT i, i FROM generate_series(1, 100) i""",
        {"table": "events", "key": "tenant", "partition_by": "hash", "modulus": 4}),
    "names that are traps": (
        """CREATE SCHEMA "My ""Shop"; CREATE TABLE "My ""Shop"."runbook row" ("Id %s {x}" int PRIMARY KEY, "the key" text NOT NULL, "select" text, "a;b" text UNIQUE);
        CREATE TABLE "My ""Shop".its ("x" serial PRIMARY KEY, "ref col" int NOT NULL REFERENCES "My ""Shop"."runbook row");
        INSERT INTO "My ""Shop"."runbook row" SELECT i, CASE WHEN i % 3 = 0 THEN 'it''s' ELSE 'b {y} %s' END, '', i FROM generate_series(1, 20) i;
        INSERT INTO "My ""Shop".its ("ref col") SELECT i FROM generate_series(1, 20) i""",
        {"table": 'My "Shop.runbook row', "key": "the key"}),
    "a key to itself": (
        """CREATE TABLE staff (id int PRIMARY KEY, kind text NOT NULL, boss int REFERENCES staff);
        INSERT INTO staff SELECT i, CASE WHEN i % 5 = 0 THEN 'b' ELSE 'a' END, nullif(i / 5 * 5, 0) FROM generate_series(1, 50) i""",
        {"table": "staff", "key": "kind"}),
    "no rows": ("CREATE TABLE t (id int PRIMARY KEY, k text NOT NULL)", {"table": "t", "key": "k", "partitions": {"t_a": ["a"], "t_b": ["b"]}}),
    "a partition for NULL": (
        "CREATE TABLE t (id int PRIMARY KEY, k text); INSERT INTO t VALUES (1, 'a'), (2, NULL), (3, 'b')",
        {"table": "t", "key": "k", "partitions": {"t_a": ["a"], "t_none": [None], "t_rest": "default"}}),
}  # fmt: skip
SHORT = {"range, identities, a key that may be NULL", "names that are traps"}


@pytest.mark.long
@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in SHORT else pytest.mark.long) for name in TABLES])
def test_any_table_is_shown_before_and_after(database, sql, tmp_path, name):
    text, given = TABLES[name]
    sql(text)
    run, file, before = migration.plan(database, **given), tmp_path / "queries.sql", None
    source, key = run.plan.source.as_string(None), run.plan.names("")["key"].as_string(None)
    file.write_text(f"SELECT * FROM {source} WHERE {key} = $1;\nSELECT 1 FROM {source};\n")
    for last in ("plan", "keys check", "cutover check"):
        migration.walk(run, migration.FORWARD, last=last) if last != "plan" else None
        made = [schemas(run), application.Schema(run).inserts().text]
        assert made == (before or made), last
        before = made
        tried = shown(run)
        assert len(tried) > 12 and not any("not tried" in what for what in tried)
        queries.compare(run, str(file))
        found = run.finished("application", "queries").facts["statements"]
        assert [each["prunes"] for each in found] == [True, False], last
        application.check(run)
    monitor.look(run, str(file))
    assert run.finished("monitor", "look").facts["pruning_percent"] == 50
    monitor.check(run, max_default_rows=1, min_ahead=0)


@pytest.mark.long
def test_a_key_that_is_an_interval_of_months_is_shown(database, sql):
    sql(
        "CREATE TABLE rents (id int PRIMARY KEY, term interval NOT NULL); INSERT INTO rents VALUES (1, '1 mon'), (2, '1 day'), (3, '1 day')"
    )
    run = migration.forward(database, table="rents", key="term")
    assert shown(run)
    verify.check(run)


@pytest.mark.long
@pytest.mark.parametrize(("change", "gone"), [
    ("ALTER TABLE users RENAME role TO kind", r"public\.users\.role was"), ("ALTER TABLE users DROP phone CASCADE", r"public\.users\.phone was"),
    ("ALTER TABLE appointments RENAME TO visits", r"public\.appointments\.user_id, public\.appointments\.user_role were"),
])  # fmt: skip
def test_what_is_not_there_any_more_is_named(forward, sql, change, gone):
    run = forward()
    sql(change)
    with pytest.raises(OutOfOrder, match=rf"public\.users is not what it was planned to be: {gone} dropped or renamed since"):
        schemas(run)
    if "role" in gone and "appointments" not in gone:
        with pytest.raises(OutOfOrder, match="role was dropped or renamed since"):
            additions.draft(run, add={"users_nurses": ["nurse"]})

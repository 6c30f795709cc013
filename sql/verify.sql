-- 06: every promise, asked of the database itself. Where a statement answers for promises, `ok` is its verdict and NULL
-- means that it could not be tried. Nothing here keeps a change: what writes is rolled back.

-- name: commands
-- The commands by which this migration was verified when it was done by hand; names are quoted only where they must be.
SELECT concat_ws(E'\n\n',
         -- psql ends a command at the line's end: a line break in a name is any one character to it
         E'-- Check partition structure\n\\d+ ' || regexp_replace(to_regclass({root})::text, '[\r\n]', '"?"', 'g'),
         E'-- View data distribution\n' || string_agg(format('SELECT %L%s, COUNT(*) FROM %s', p.part ->> 'name',
           CASE p.place WHEN 1 THEN ' as partition' ELSE '' END, t.leaf), E'\nUNION ALL\n' ORDER BY p.place) FILTER (WHERE t.leaf IS NOT NULL) || ';',
         E'-- Test partition pruning\n' || CASE WHEN m.plan ->> 'frequent_value' IS NOT NULL THEN
           format('EXPLAIN ANALYZE SELECT * FROM %s WHERE %I = %L;', to_regclass({root}), m.plan ->> 'key', m.plan ->> 'frequent_value') END,
         (SELECT string_agg(DISTINCT format(E'-- Check foreign keys\nSELECT constraint_name, table_name \n'
                   'FROM information_schema.table_constraints \nWHERE table_name = %L AND constraint_type = ''FOREIGN KEY'';',
                   coalesce(r ->> 'table', m.plan -> 'table' ->> 'name')), E'\n\n')
            FROM (SELECT) one LEFT JOIN jsonb_array_elements(m.plan -> 'references') r ON true)) AS text
  FROM ({grown}) m CROSS JOIN jsonb_array_elements(m.plan -> 'partitions') WITH ORDINALITY p(part, place)
 CROSS JOIN to_regclass(quote_ident(m.plan -> 'table' ->> 'schema_name') || '.' || quote_ident(p.part ->> 'name')) t(leaf)
 WHERE m.id = {migration} GROUP BY m.id, m.plan

-- name: oid
SELECT to_regclass({root})::oid::bigint AS oid

-- name: tree
-- Root and partitions, each below its parent; the size of a root is that of all below it, pg_total_relation_size alone would say 0.
SELECT c.relname AS name, coalesce(p.relname, '') AS parent, t.level,
       coalesce(pg_get_expr(c.relpartbound, c.oid), 'PARTITION BY ' || pg_get_partkeydef(c.oid)) AS bound, b.table_bytes, b.index_bytes
  FROM pg_partition_tree({root}) t
  JOIN pg_class c ON c.oid = t.relid LEFT JOIN pg_class p ON p.oid = t.parentrelid
 CROSS JOIN LATERAL (SELECT sum(pg_table_size(b.relid))::bigint AS table_bytes, sum(pg_indexes_size(b.relid))::bigint AS index_bytes
                       FROM pg_partition_tree(t.relid) b) b
 ORDER BY ARRAY(SELECT a.relid::oid FROM pg_partition_ancestors(t.relid) WITH ORDINALITY a(relid, place) ORDER BY a.place DESC)

-- name: added
-- What 20 added since, as the ledger has it.
SELECT jsonb_array_elements_text(a.evidence -> 'partitions') FROM runbook.action a
 WHERE a.migration = {migration} AND a.step = 'add' AND a.action LIKE 'attach %' AND a.state = 'done'

-- name: known
-- The plan's partitions, and what 20 added since: others came by hand.
SELECT p ->> 'name' FROM runbook.migration m CROSS JOIN jsonb_array_elements(m.plan -> 'partitions') p WHERE m.id = {migration} UNION {added}

-- name: grown
-- The migration, with the partitions of today: the plan's that are there, and what came since, by 20 or by hand: their values are not
-- kept, and rows they had none.
SELECT m.id, m.plan || jsonb_build_object('partitions', (
       SELECT coalesce(jsonb_agg(coalesce(p.part, jsonb_build_object('name', c.relname, 'values', '[]'::jsonb, 'rows', NULL, 'bound', pg_get_expr(c.relpartbound, c.oid)))
                ORDER BY p.place, c.oid), '[]')
         FROM pg_partition_tree({root}) t JOIN pg_class c ON c.oid = t.relid JOIN pg_namespace n ON n.oid = c.relnamespace AND n.nspname = m.plan -> 'table' ->> 'schema_name'
         LEFT JOIN jsonb_array_elements(m.plan -> 'partitions') WITH ORDINALITY p(part, place) ON p.part ->> 'name' = c.relname
        WHERE t.level > 0 AND (t.isleaf OR p.part IS NOT NULL))) AS plan
  FROM runbook.migration m

-- name: leaves
SELECT count(*) FILTER (WHERE isleaf) AS leaves FROM pg_partition_tree({root})

-- name: partitions
-- What came or went by hand is named: whether each row is there still, and in its place, others ask. A partition by another name is
-- neither: 91 and 90 know it by its own.
WITH now AS ({tree}),
     was AS (SELECT k.name, p.part ->> 'bound' AS bound, now.name IS NULL AS gone, now.name IS NULL AND EXISTS (
                    SELECT FROM now o WHERE o.level > 0 AND lower(translate(p.part ->> 'bound', ' ''', '')) = lower(translate(o.bound, ' ''', ''))) AS renamed
               FROM ({known}) k(name) LEFT JOIN now ON now.level > 0 AND now.name = k.name::name
               LEFT JOIN LATERAL (SELECT p FROM runbook.migration m, jsonb_array_elements(m.plan -> 'partitions') p WHERE m.id = {migration} AND p ->> 'name' = k.name) p(part) ON true),
     told AS (SELECT (SELECT string_agg(name, ', ' ORDER BY name) FROM was WHERE renamed) AS renamed,
                     (SELECT string_agg(name, ', ' ORDER BY name) FROM was WHERE gone AND NOT renamed) AS gone,
                     (SELECT string_agg(name, ', ' ORDER BY name) FROM now WHERE level > 0 AND NOT EXISTS (
                       SELECT FROM was w WHERE w.name::name = now.name OR w.renamed AND lower(translate(w.bound, ' ''', '')) = lower(translate(now.bound, ' ''', '')))) AS came)
SELECT 'It is partitioned as planned' AS promise,
       concat('there is no ' || told.renamed || ', unless by another name: ', 'gone since: ' || told.gone || '; ', 'came since: ' || told.came || '; ',
              (SELECT string_agg(now.name || ' ' || now.bound, '; ' ORDER BY now.level, now.name) FROM now)) AS seen,
       coalesce((SELECT lower(now.bound) = lower(format('PARTITION BY %s (%I)', m.plan ->> 'partition_by', m.plan ->> 'key')) FROM now WHERE level = 0), false)
         AND told.renamed IS NULL
         -- by hash a remainder that is gone is taken by nothing but what its partition was divided into
         AND (m.plan ->> 'partition_by' <> 'hash' OR told.gone IS NULL OR told.came IS NOT NULL)
         -- by list every row is looked at; the other bounds must read as planned
         AND NOT EXISTS (SELECT FROM now JOIN was ON was.name::name = now.name AND now.level > 0 WHERE m.plan ->> 'partition_by' <> 'list'
                            AND lower(translate(was.bound, ' ''', '')) <> lower(translate(now.bound, ' ''', ''))) AS ok
  FROM runbook.migration m CROSS JOIN told WHERE m.id = {migration}

-- name: columns
-- The partition key is NOT NULL now, if it was not before, unless a partition takes NULL.
SELECT 'Its columns are those that it had' AS promise, coalesce('not so: ' || string_agg(c ->> 'name', ', ') FILTER (WHERE now.name IS NULL), count(*) || ' columns') AS seen,
       count(*) = count(now.name) AS ok
  FROM runbook.migration m CROSS JOIN jsonb_array_elements(m.plan -> 'columns') c
  LEFT JOIN ({columns_now}) now ON now.name = c ->> 'name' AND now.type = c ->> 'type' AND now.generated = (c ->> 'generated')::boolean
   AND now.not_null = ((c ->> 'not_null')::boolean OR c ->> 'name' = m.plan ->> 'key' AND NOT m.plan -> 'partitions' @> '[{{"values": [null]}}]')
   AND now.default IS NOT DISTINCT FROM c ->> 'default'
   AND now.identity = c ->> 'identity'
   AND (now.kept = c ->> 'kept' OR starts_with(now.kept, (c ->> 'kept') || ' '))  -- a comment or a target that came since
   AND now.sequence IS NOT DISTINCT FROM c ->> 'sequence'
   AND now.identity_options IS NOT DISTINCT FROM c ->> 'identity_options'
 WHERE m.id = {migration}

-- name: indexes
-- By name and definition, on the root where an index can stand there and on every partition. A repair did not choose the
-- partitions' names: there the root answers for them, whose index is valid only when every partition has one.
WITH planned AS (
  SELECT i.*, p.table, p.name AS wanted, CASE WHEN m.plan ->> 'key' = ANY (i.columns) THEN i.columns ELSE i.columns || (m.plan ->> 'key') END AS new_key,
         i.unique AND NOT m.plan ->> 'key' = ANY (i.columns) AND NOT coalesce(m.plan -> 'guards', '[]') @> jsonb_build_array(jsonb_build_object('index', i.name)) AS apart, i.columns AS own,
         i.primary AND (m.plan ->> 'key_nullable')::boolean AND m.plan -> 'partitions' @> '[{{"values": [null]}}]' AS takes_null
    FROM runbook.migration m CROSS JOIN LATERAL jsonb_to_recordset(m.plan -> 'indexes') AS i(
         name text, "unique" boolean, "primary" boolean, columns text[], tail text, constraint_type text, everywhere boolean, leaf_names jsonb)
   CROSS JOIN LATERAL (
         SELECT m.plan -> 'table' ->> 'name', i.name WHERE i.everywhere
         UNION ALL SELECT key, value FROM jsonb_each_text(i.leaf_names) WHERE m.plan ->> 'restore_from' = 'source'
            AND key IN (SELECT c.relname FROM pg_partition_tree({root}) t JOIN pg_class c ON c.oid = t.relid)) p("table", name)
   WHERE m.id = {migration}),
now AS (
  SELECT c.relname AS table, x.relname AS name, i.indisunique AS unique, i.indisprimary AS primary, i.indisvalid AS valid,
         k.contype::text AS constraint_type, pg_get_indexdef(x.oid) AS definition,
         substr(pg_get_indexdef(x.oid), length('CREATE ' || CASE WHEN i.indisunique THEN 'UNIQUE ' ELSE '' END || 'INDEX ' || quote_ident(x.relname)
                || ' ON ' || CASE WHEN c.relkind = 'p' THEN 'ONLY ' ELSE '' END
                || quote_ident(n.nspname) || '.' || quote_ident(c.relname) || ' USING ') + 1) AS whole,
         coalesce(' WHERE ' || pg_get_expr(i.indpred, i.indrelid), '') AS predicate,
         (SELECT ' TABLESPACE ' || quote_ident(spcname) FROM pg_tablespace WHERE oid = x.reltablespace) AS space,
         (SELECT array_agg(a.attname::text ORDER BY u.ord) FROM unnest(i.indkey::int2[]) WITH ORDINALITY u(attnum, ord)
            JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = u.attnum WHERE u.ord <= i.indnkeyatts) AS columns
    FROM pg_partition_tree({root}) t JOIN pg_class c ON c.oid = t.relid JOIN pg_namespace n ON n.oid = c.relnamespace
    JOIN pg_index i ON i.indrelid = c.oid JOIN pg_class x ON x.oid = i.indexrelid
    LEFT JOIN pg_constraint k ON k.conindid = x.oid AND k.conrelid = c.oid AND k.contype IN ('p', 'u', 'x'))
SELECT format('Index %s stands: %s%s', p.name, CASE WHEN p.primary AND NOT p.takes_null THEN 'primary key ' WHEN p.unique THEN 'unique ' ELSE '' END,
              CASE WHEN p.primary THEN format('(%s)', array_to_string(p.new_key, ', ')) ELSE p.tail END) AS promise,
       coalesce('not so: ' || string_agg(format('%s of %s is %s', p.wanted, p.table,
           CASE WHEN now.name IS NULL THEN 'missing' WHEN now.valid THEN now.definition ELSE 'not valid' END), '; ') FILTER (WHERE NOT same.ok),
         'on ' || string_agg(p.table, ', ' ORDER BY p.table) || CASE WHEN p.apart THEN format(': unique in each partition, no longer in the whole table%s', ' (' || array_to_string(p.own, ', ') || ')') ELSE '' END) AS seen,
       bool_and(same.ok) AS ok
  FROM planned p LEFT JOIN now ON now.table = p.table AND now.name = p.wanted
 CROSS JOIN LATERAL (SELECT now.name IS NOT NULL AND now.valid AND now.unique = p.unique AND now.primary = (p.primary AND NOT p.takes_null)
    AND now.constraint_type IS NOT DISTINCT FROM CASE WHEN p.takes_null THEN 'u' ELSE p.constraint_type END
    AND CASE WHEN p.primary THEN now.columns = p.new_key ELSE left(now.whole, length(now.whole) - length(now.predicate)) || coalesce(now.space, '') || now.predicate = p.tail END AS ok) same
 GROUP BY p.name, p.primary, p.unique, p.tail, p.new_key, p.takes_null, p.apart, p.own ORDER BY p.primary DESC, p.name

-- name: references
-- The plan's text and the server's differ in quotes and in what is left out because it is the default.
SELECT format('Key %s of %s is composite%s', r ->> 'name', r ->> 'table', CASE WHEN r ->> 'definition' ~ ' NOT (VALID|ENFORCED)$' THEN ', as unchecked as it was' ELSE ' and valid' END) AS promise,
       CASE WHEN d.dropped THEN format('%s.%s is there no more: somebody dropped it', r ->> 'schema_name', r ->> 'table')
            ELSE coalesce(now.definition || CASE WHEN now.validated THEN '' ELSE ' (never validated)' END, 'missing') END AS seen,
       CASE WHEN NOT d.dropped THEN coalesce((now.validated OR r ->> 'definition' ~ ' NOT (VALID|ENFORCED)$') AND translate(replace(now.definition, ' NOT VALID', ''), '" ', '') =
         replace(replace(translate(r ->> 'composite', '" ', ''), 'ONUPDATENOACTION', ''), 'ONDELETENOACTION', ''), false) END AS ok
  FROM runbook.migration m CROSS JOIN jsonb_array_elements((m.plan -> 'references') || coalesce(m.plan -> 'selves', '[]')) r
  LEFT JOIN ({incoming_now}) now ON (now.schema, now.table, now.name) = (r ->> 'schema_name', r ->> 'table', r ->> 'name')
 CROSS JOIN LATERAL (SELECT concat(r ->> 'schema_name', '.', r ->> 'table') = ANY ({dropped}::text[])) d(dropped)
 WHERE m.id = {migration}

-- name: filled
-- What keeps a row from having no partition key, with which it could refer to nobody; and what fills it in.
SELECT format('No row of %s has a key without its %s', {table_text}, {role_text}) AS promise, w.required AND w.helped AS ok,
       concat_ws('; ', CASE WHEN w.required THEN 'it is required' ELSE 'nothing requires it' END,
                 CASE WHEN NOT w.helped THEN 'what fills it in for old code is missing, disabled or not ENABLE ALWAYS' WHEN {triggers}::text[] <> '{{}}' THEN 'and filled in for old code' END) AS seen
  FROM (SELECT EXISTS (SELECT FROM pg_attribute WHERE attrelid = to_regclass({reference_text}) AND attname = {role_text} AND attnotnull AND NOT attisdropped)
               OR EXISTS (SELECT FROM pg_constraint WHERE conrelid = to_regclass({reference_text}) AND conname = {check_text} AND convalidated) AS required,
               (SELECT count(*) FROM pg_trigger WHERE tgrelid = to_regclass({reference_text}) AND tgname = ANY ({triggers}::text[]) AND tgenabled = 'A')
               = cardinality({triggers}::text[]) AND NOT EXISTS (
                 SELECT FROM pg_partition_tree(to_regclass({reference_text})) p WHERE p.isleaf AND p.level > 0 AND cardinality({triggers}::text[]) > (
                   SELECT count(*) FROM pg_trigger WHERE tgrelid = p.relid AND tgname = ANY ({triggers}::text[])
                      -- before 16 a partition that came by hand has them, but not ALWAYS
                      AND (tgenabled = 'A' OR tgenabled = 'O' AND current_setting('server_version_num')::int < 160000))) AS helped) w

-- name: constraints
SELECT format('%s %s is as it was', p.kind, p.k ->> 'name') AS promise,
       coalesce(now.definition || CASE WHEN now.name <> p.k ->> 'name' THEN format(' (as %s: it was renamed since)', now.name) ELSE '' END, 'missing') AS seen,
       coalesce(now.validated >= (p.k ->> 'validated')::boolean
         AND (replace(now.definition, ' NOT VALID', '') = replace(p.k ->> 'definition', ' NOT VALID', '') OR EXISTS (
              -- or a later migration, of the table that is referred to, gave it the partition key
              SELECT FROM runbook.migration o, jsonb_array_elements(o.plan -> 'references') r
               WHERE o.id <> m.id AND o.state IN ('open', 'finished') AND r ->> 'name' = now.name AND r ->> 'schema_name' = m.plan -> 'table' ->> 'schema_name'
                 AND r ->> 'table' = m.plan -> 'table' ->> 'name' AND translate(replace(now.definition, ' NOT VALID', ''), '" ', '') =
                     replace(replace(translate(r ->> 'composite', '" ', ''), 'ONUPDATENOACTION', ''), 'ONDELETENOACTION', ''))), false) AS ok
  FROM runbook.migration m
 CROSS JOIN LATERAL (SELECT 'Check', c FROM jsonb_array_elements(m.plan -> 'checks') c
                     UNION ALL SELECT 'Foreign key', f FROM jsonb_array_elements(m.plan -> 'outgoing') f
                      WHERE NOT coalesce(m.plan -> 'selves', '[]') @> jsonb_build_array(jsonb_build_object('name', f -> 'name'))) p(kind, k)
  LEFT JOIN LATERAL (
       SELECT * FROM (SELECT name, definition, validated FROM ({outgoing_now}) f WHERE name = p.k ->> 'name'
                      UNION ALL SELECT name, definition, validated FROM ({checks_now}) c WHERE p.kind = 'Check' AND (name = p.k ->> 'name' OR definition = p.k ->> 'definition')) n
        ORDER BY n.name = p.k ->> 'name' DESC LIMIT 1) now ON true
 WHERE m.id = {migration}

-- name: carried
WITH now AS MATERIALIZED ({carried_now})
SELECT format('The %s is as it was: %s', c ->> 'kind', c ->> 'name') AS promise,
       coalesce(now.definition, (SELECT o.definition FROM now o WHERE (o.kind, o.name) = (c ->> 'kind', c ->> 'name') LIMIT 1), 'missing') AS seen, now.name IS NOT NULL AS ok
  FROM runbook.migration m CROSS JOIN jsonb_array_elements(m.plan -> 'carried') c
  LEFT JOIN now ON (now.kind, now.name, now.definition) = (c ->> 'kind', c ->> 'name', c ->> 'definition')
 WHERE m.id = {migration} AND c ->> 'kind' NOT IN ('index statistics', 'cluster on', 'replica identity', 'replica identity using index')
UNION ALL
SELECT format('The materialized view reads it: %s.%s', v ->> 'schema_name', v ->> 'name'), CASE WHEN now.name IS NULL THEN 'it does not' ELSE 'it does' END, now.name IS NOT NULL
  FROM runbook.migration m CROSS JOIN jsonb_array_elements(coalesce(m.plan -> 'matviews', '[]')) v
  LEFT JOIN ({views_now}) now ON now.materialized AND (now.schema, now.name) = (v ->> 'schema_name', v ->> 'name')
 WHERE m.id = {migration}
UNION ALL
SELECT format('The view reads it: %s', v ->> 'name'), CASE WHEN now.name IS NULL THEN 'it does not' WHEN now.definition <> v ->> 'definition' THEN now.definition ELSE 'it does' END,
       now.name IS NOT NULL AND now.definition = v ->> 'definition'
  FROM runbook.migration m CROSS JOIN jsonb_array_elements(m.plan -> 'views') v
  LEFT JOIN ({views_now}) now ON now.schema || '.' || now.name = v ->> 'name'
 WHERE m.id = {migration}

-- name: guard
-- One statement, one snapshot: the guard holds the key of every row and nothing else, and its triggers are on everywhere.
SELECT format('Key %s is unique in the whole table', {name_text}) AS promise,
       format('%s rows have it, the guard holds %s; it lacks %s; triggers are missing on %s%s', t.keys, g.keys, t.lacking,
              coalesce(string_agg(c.relname, ', '), 'no partition'),
              CASE WHEN g.keys > t.keys THEN '; 20_add_partitions shows how it forgets what a detached partition took along' END) AS seen,
       t.keys = g.keys AND t.lacking = 0 AND count(c) = 0 AS ok
  FROM (SELECT count(*) AS keys, count(*) FILTER (WHERE NOT EXISTS (SELECT FROM {guard} g WHERE {g_is_o})) AS lacking
          FROM (SELECT {values} FROM {source} r {where}) o) t
 CROSS JOIN (SELECT count(*) AS keys FROM {guard}) g
  LEFT JOIN (SELECT c.* FROM pg_partition_tree({root}) p JOIN pg_class c ON c.oid = p.relid
              WHERE 2 > (SELECT count(*) FROM pg_trigger t WHERE t.tgrelid = c.oid AND t.tgfoid = to_regproc({function_text})
                       -- before 16 a partition that came by hand has them, but not ALWAYS
                       AND (t.tgenabled = 'A' OR t.tgenabled = 'O' AND p.level > 0 AND c.relname NOT IN (SELECT k::name FROM ({known}) k(k))))) c ON true
 GROUP BY t.keys, g.keys, t.lacking

-- name: storage
-- Of root and partitions: owner, comment, tablespace, options, replica identity, and of their indexes what does not stand in a definition.
WITH plan AS (SELECT m.plan, m.plan -> 'table' AS "table" FROM runbook.migration m WHERE m.id = {migration}),
now AS (
  SELECT c.*, t.level, ARRAY(SELECT o FROM unnest(c.reloptions || ARRAY(SELECT 'toast.' || o FROM pg_class toast, unnest(toast.reloptions) o
                              WHERE toast.oid = c.reltoastrelid)) o ORDER BY o) AS options,
         coalesce((SELECT spcname FROM pg_tablespace WHERE oid = c.reltablespace), '') AS space
    FROM pg_partition_tree({root}) t JOIN pg_class c ON c.oid = t.relid WHERE t.level = 0 OR c.relname IN (SELECT k::name FROM ({known}) k(k)))
SELECT 'Table and partitions have their owner, comment, tablespace and storage options' AS promise,
       coalesce('not so: ' || string_agg(DISTINCT now.relname, ', ') FILTER (WHERE NOT same.ok), 'owner ' || max(p."table" ->> 'owner')) AS seen, bool_and(same.ok) AS ok
  FROM plan p CROSS JOIN now
 CROSS JOIN LATERAL (SELECT pg_get_userbyid(now.relowner) = p."table" ->> 'owner' AND now.space = p."table" ->> 'tablespace'
    AND (now.level = 0 OR now.options @> ARRAY(SELECT o FROM jsonb_array_elements_text(p."table" -> 'options') o))  -- more of both may have come since
    AND (now.level > 0 OR coalesce(obj_description(now.oid, 'pg_class') = p."table" ->> 'comment', p."table" ->> 'comment' IS NULL)) AS ok) same
UNION ALL
SELECT 'Its extended statistics are each partition''s own, too', coalesce('lacking on ' || string_agg(DISTINCT now.relname, ', ') FILTER (WHERE l.oid IS NULL), 'on every partition'),
       bool_and(l.oid IS NOT NULL)
  FROM plan p CROSS JOIN now JOIN pg_statistic_ext x ON x.stxrelid = {root}::regclass AND p.plan -> 'carried' @> jsonb_build_array(jsonb_build_object('kind', 'statistics', 'name', x.stxname))
  LEFT JOIN pg_statistic_ext l ON l.stxrelid = now.oid AND l.stxkind = x.stxkind AND pg_get_statisticsobjdef_columns(l.oid) = pg_get_statisticsobjdef_columns(x.oid)
 WHERE now.level > 0 HAVING count(*) > 0
UNION ALL
SELECT 'Its replica identity is as it was', coalesce('not so: ' || string_agg(now.relname, ', ') FILTER (WHERE NOT same.ok), 'on every partition'), bool_and(same.ok)
  FROM plan p CROSS JOIN now
  LEFT JOIN LATERAL (SELECT i FROM jsonb_array_elements(p.plan -> 'indexes') i WHERE (i ->> 'replica_identity')::boolean) i ON true
 CROSS JOIN LATERAL (SELECT CASE WHEN i IS NULL THEN now.relreplident::text = p."table" ->> 'replica_identity'
    WHEN now.level = 0 AND NOT (i ->> 'everywhere')::boolean THEN true
    ELSE EXISTS (SELECT FROM pg_index x JOIN pg_class n ON n.oid = x.indexrelid WHERE x.indrelid = now.oid AND x.indisreplident
           AND coalesce(n.relname = CASE now.level WHEN 0 THEN i ->> 'name' ELSE i -> 'leaf_names' ->> now.relname END, true)) END AS ok) same  -- 20 names its own
UNION ALL
SELECT format('Index %s keeps its statistics targets, comment and CLUSTER ON', i ->> 'name'),
       coalesce('not so: ' || string_agg(wanted.name, ', ') FILTER (WHERE NOT same.ok), 'with all its partitions'), bool_and(same.ok)
  FROM plan p CROSS JOIN jsonb_array_elements(p.plan -> 'indexes') i
 CROSS JOIN LATERAL (SELECT i ->> 'name', true WHERE (i ->> 'everywhere')::boolean UNION ALL
                     SELECT value, false FROM jsonb_each_text(i -> 'leaf_names') WHERE key IN (SELECT relname FROM now)) wanted(name, root)
  LEFT JOIN (SELECT c.relname AS name, c.oid, x.indisclustered FROM now t JOIN pg_index x ON x.indrelid = t.oid JOIN pg_class c ON c.oid = x.indexrelid) x ON x.name = wanted.name
 CROSS JOIN LATERAL (SELECT coalesce(x.indisclustered = ((i ->> 'clustered')::boolean AND NOT wanted.root)
    AND (wanted.root <> (i ->> 'everywhere')::boolean OR coalesce(obj_description(x.oid, 'pg_class') = i ->> 'comment', i ->> 'comment' IS NULL))
    AND (SELECT jsonb_object_agg(a.attnum, to_jsonb(a) -> 'attstattarget') FROM pg_attribute a WHERE a.attrelid = x.oid AND (to_jsonb(a) ->> 'attstattarget')::int >= 0)
        IS NOT DISTINCT FROM nullif(i -> 'statistics', 'null'), false) AS ok) same
 WHERE (i ->> 'clustered')::boolean OR i ->> 'comment' IS NOT NULL OR i ->> 'statistics' IS NOT NULL
 GROUP BY i ->> 'name'

-- name: positions
-- An identity's sequence is a new one: it must stand where the original's stands, or beyond.
SELECT format('Sequence %s goes on where it stood', c ->> 'identity_sequence') AS promise,
       coalesce({reason}, format('it stands at %s, the original''s at %s', coalesce(now.position::text, 'its start'), coalesce(old.position::text, 'its start'))) AS seen,
       CASE WHEN {reason} IS NULL THEN coalesce(now.position * sign(q.seqincrement) >= old.position * sign(q.seqincrement), old.position IS NULL) END AS ok
  FROM runbook.migration m CROSS JOIN jsonb_array_elements(m.plan -> 'columns') c
 CROSS JOIN LATERAL (SELECT pg_get_serial_sequence({root}, c ->> 'name')::regclass AS oid,
    CASE WHEN {reason} IS NULL THEN pg_get_serial_sequence({retired_text}, c ->> 'name')::regclass END AS retired) s
 CROSS JOIN LATERAL (SELECT pg_sequence_last_value(s.oid) AS position) now
 CROSS JOIN LATERAL (SELECT pg_sequence_last_value(s.retired) AS position) old
  LEFT JOIN pg_sequence q ON q.seqrelid = s.oid
 WHERE m.id = {migration} AND c ->> 'identity' <> ''

-- name: logged
-- A trigger that is missing, or not ENABLE ALWAYS, lets changes slip past the way back; of a partition that came by hand it looks at
-- every row in any case.
SELECT 'Every change is logged for the way back' AS promise,
       coalesce({reason}, 'not on ' || string_agg(c.relname, ', ') FILTER (WHERE k.known AND NOT k.logged),
                'on every partition' || coalesce('; for ' || string_agg(c.relname, ', ') FILTER (WHERE NOT k.known) || ', made by hand, 90_rollback looks at every row', '')) AS seen,
       CASE WHEN {reason} IS NULL THEN bool_and(k.logged OR NOT k.known) END AS ok
  FROM pg_partition_tree({root}) p JOIN pg_class c ON c.oid = p.relid
 CROSS JOIN LATERAL (SELECT p.level = 0 OR c.relname IN (SELECT k::name FROM ({known}) k(k)) AS known,
                            2 = (SELECT count(*) FROM pg_trigger t WHERE t.tgrelid = c.oid AND t.tgenabled = 'A' AND t.tgname IN ('runbook_log_back', 'runbook_log_truncate')) AS logged) k

-- name: bounds
-- What the server asks of a row before it takes it into a partition; of an only DEFAULT one nothing.
SELECT c.relname AS name, coalesce(pg_get_partition_constraintdef(c.oid), 'true') AS bound
  FROM ({grown}) m CROSS JOIN jsonb_array_elements(m.plan -> 'partitions') WITH ORDINALITY p(part, place)
  JOIN pg_class c ON c.oid = to_regclass(format('%I.%I', m.plan -> 'table' ->> 'schema_name', p.part ->> 'name')) AND c.relispartition
 WHERE m.id = {migration} ORDER BY p.place

-- name: bounded
-- Whether each row is one that the partition's bound takes.
SELECT p.part ->> 'name' AS name, p.part ->> 'bound' AS bound, now.rows, coalesce((p.part ->> 'rows')::bigint, 0) AS before,
       format('%s holds its own rows only', p.part ->> 'name') AS promise,
       format('%s, %s elsewhere', CASE now.rows WHEN 1 THEN '1 row' ELSE to_char(now.rows, 'FM999,999,999,990 "rows"') END,
              CASE now.elsewhere WHEN 1 THEN '1 that belongs' ELSE to_char(now.elsewhere, 'FM999,999,999,990 "that belong"') END) AS seen,
       now.elsewhere = 0 AS ok
  FROM ({grown}) m CROSS JOIN jsonb_array_elements(m.plan -> 'partitions') p(part)
 CROSS JOIN (SELECT count(*) AS rows, count(*) FILTER (WHERE ({condition}) IS NOT TRUE) AS elsewhere FROM ONLY {leaf}) now
 WHERE m.id = {migration} AND p.part ->> 'name' = {leaf_name}

-- name: create_plans
-- What the planner reads for each value of the key and for each unique key. The latter are prepared statements planned
-- for any value: nobody's data are needed, and none are shown.
CREATE FUNCTION pg_temp.plans() RETURNS TABLE (look_up text, reads text[], promise text, sql text, seen text, ok boolean) LANGUAGE plpgsql AS $plans$
#variable_conflict use_column
DECLARE
  plan jsonb := (SELECT m.plan FROM ({grown}) m WHERE m.id = {migration});
  root text := to_regclass({root})::text;
  part jsonb; unique_key record; explained jsonb; listed text;
  relations CONSTANT jsonpath := '$.**."Relation Name"';
BEGIN
  FOR part IN SELECT * FROM jsonb_array_elements(plan -> 'partitions') LOOP
    SELECT string_agg(quote_literal(v), ', ') INTO listed FROM jsonb_array_elements_text(part -> 'values') v;
    IF listed IS NULL THEN
      EXECUTE format('SELECT quote_literal(%I::text) FROM ONLY %I.%I LIMIT 1', plan ->> 'key', plan -> 'table' ->> 'schema_name', part ->> 'name') INTO listed;
      IF listed IS NULL THEN  -- by range the lower bound is one
        listed := quote_literal(nullif(substring(part ->> 'bound' FROM ' FROM \(''?(.*?)''?\) TO '), 'MINVALUE'));
      END IF;
    END IF;
    look_up := concat_ws(' OR ', quote_ident(plan ->> 'key') || ' IN (' || listed || ')',
                         CASE WHEN part -> 'values' @> 'null' THEN format('%I IS NULL', plan ->> 'key') END);
    promise := format('Queries for %s read no other partition', part ->> 'name');
    IF look_up = '' THEN
      look_up := format('(a value of %s)', part ->> 'name');
      reads := NULL;
      sql := '';
      seen := 'it is empty, and no value that it takes is known';
      ok := NULL;
    ELSE
      sql := format('EXPLAIN (FORMAT JSON, COSTS OFF) SELECT * FROM %s WHERE %s', root, look_up);
      EXECUTE sql INTO explained;
      reads := ARRAY(SELECT DISTINCT r #>> '{{}}' FROM jsonb_path_query(explained, relations) r ORDER BY 1);
      seen := 'they read ' || coalesce(nullif(array_to_string(reads, ', '), ''), 'nothing')
              || CASE current_setting('enable_partition_pruning') WHEN 'off' THEN ': enable_partition_pruning is off' ELSE '' END;
      ok := reads = ARRAY[part ->> 'name'];
    END IF;
    RETURN NEXT;
  END LOOP;
  SET LOCAL plan_cache_mode = force_generic_plan;
  promise := NULL;
  FOR unique_key IN {unique_keys} LOOP
    look_up := unique_key.condition;
    EXECUTE format('PREPARE runbook_look_up AS SELECT * FROM %s WHERE %s', root, unique_key.condition);
    sql := format('EXPLAIN (FORMAT JSON, COSTS OFF) EXECUTE runbook_look_up(%s)', unique_key.any_values);
    EXECUTE sql INTO explained;
    DEALLOCATE runbook_look_up;
    reads := ARRAY(SELECT DISTINCT r #>> '{{}}' FROM jsonb_path_query(explained, relations) r ORDER BY 1);
    RETURN NEXT;
  END LOOP;
END $plans$

-- name: plans
SELECT * FROM pg_temp.plans()

-- name: unique_keys
-- The old primary key and every unique key on plain columns: by them an application finds single rows.
SELECT string_agg(format('%I = $%s', c.name, c.place), ' AND ' ORDER BY c.place) AS condition,
       string_agg(CASE WHEN c.name = m.plan ->> 'key' THEN quote_nullable(m.plan ->> 'frequent_value') ELSE 'NULL' END, ', ' ORDER BY c.place) AS any_values,
       array_agg(c.name ORDER BY c.place) AS columns
  FROM runbook.migration m CROSS JOIN jsonb_array_elements(m.plan -> 'indexes') WITH ORDINALITY i(i, place)
 CROSS JOIN jsonb_array_elements_text(i.i -> 'columns') WITH ORDINALITY c(name, place)
 WHERE m.id = {migration} AND (i.i ->> 'unique')::boolean
 GROUP BY m.plan, i.i, i.place
HAVING i.i ->> 'tail' = format('btree (%s)', string_agg(quote_ident(c.name), ', ' ORDER BY c.place))
 ORDER BY (i.i ->> 'primary')::boolean DESC, i.place

-- name: equal
-- One statement, one snapshot. Rows whose change waits in the log for the way back are left out on both sides; after a TRUNCATE nothing
-- can be said.
SELECT r.rows, r.hash, o.rows AS retired_rows, o.hash AS retired_hash,
       CASE WHEN NOT EXISTS (SELECT FROM {log} k WHERE ROW({k_keys}) IS NULL) THEN (r.rows, r.hash) = (o.rows, o.hash) END AS ok
  FROM (SELECT count(*) AS rows, coalesce(sum({d_hash}), 0) AS hash FROM {partitioned} d WHERE {d_counts}) r
 CROSS JOIN (SELECT count(*) AS rows, coalesce(sum({s_hash}), 0) AS hash FROM ONLY {plain} s WHERE {s_counts}) o

-- name: detached
-- Partitions that somebody detached and kept, by their own names.
SELECT n.nspname AS schema, c.relname AS name
  FROM runbook.migration m CROSS JOIN ({known}) k(name) JOIN pg_namespace n ON n.nspname = m.plan -> 'table' ->> 'schema_name'
  JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = k.name::name AND c.relkind IN ('r', 'p') AND NOT c.relispartition
 WHERE m.id = {migration} AND NOT EXISTS (SELECT FROM jsonb_array_elements_text(m.plan -> 'primary_key') a(name)
         WHERE a.name NOT IN (SELECT attname FROM pg_attribute WHERE attrelid = c.oid AND attnum > 0 AND NOT attisdropped)) ORDER BY 2

-- name: not_apart
NOT EXISTS (SELECT FROM {leaf} a WHERE {a_is_s} AND NOT EXISTS (SELECT FROM {partitioned} d WHERE {d_is_s}))

-- name: same_as_backup
-- One statement, one snapshot.
SELECT (SELECT (count(*), coalesce(sum({s_hash}), 0)) FROM {backup} s) = (SELECT (count(*), coalesce(sum({d_hash}), 0)) FROM {source} d) AS same

-- name: writes_since
SELECT format('%s rows differ from the result by the writes since: %s new, %s gone, %s changed',
              count(*), count(*) FILTER (WHERE b.hash IS NULL), count(*) FILTER (WHERE t.hash IS NULL),
              count(*) FILTER (WHERE b.hash <> t.hash)) AS since
  FROM (SELECT {key_aliases}, {s_hash} AS hash FROM {backup} s) b
  FULL JOIN (SELECT {key_aliases}, {d_hash} AS hash FROM {source} d) t USING ({keys})
 WHERE b.hash IS DISTINCT FROM t.hash

-- name: missing_of_backup
-- No log tells who took away what is there no more: the application may.
SELECT 'Every row of the backup came back' AS promise, EXISTS (SELECT FROM runbook.action WHERE migration = {migration} AND (step, action, state) = ('restore', 'compare', 'done')) AS ok,
       format('03 compared them%s', coalesce('; ' || nullif(count(*), 0) || ' are gone since', '')) AS seen
  FROM {backup} s WHERE NOT EXISTS (SELECT FROM {source} d WHERE {d_is_s})

-- name: all_immediate
SET CONSTRAINTS ALL IMMEDIATE

-- name: create_trials
-- What an application does, tried on real rows. A trial is a list of statements; $1 is what the one before found, $2 a
-- value that hardly any row has. The exception at its end undoes it. Rows are named by their place: nobody's data leave
-- the server. Nobody can refer to a row that is picked, nor let go of it: it is locked, and so are those that refer to it; each
-- statement sees what is there then. `refusal` is the error that a trial must end with ('kept': that of a row
-- which is referred to), `key_name` the constraint that has to be its cause.
CREATE FUNCTION pg_temp.trials() RETURNS TABLE (promise text, sql text, seen text, ok boolean) LANGUAGE plpgsql AS $trials$
#variable_conflict use_column
DECLARE
  unheard_of CONSTANT text[] := ARRAY['no such value', gen_random_uuid()::text, '-2147483647', '-32767', '0001-01-01', '192.0.2.1', '~', 'false', 'true'];
  trial record; step text; value text; took jsonb; cause text; context text; raised boolean; said text; theirs text; part text; held jsonb := '{{}}';
  ours text[] := ARRAY(SELECT r ->> 'name' FROM runbook.migration m, jsonb_array_elements(m.plan -> 'references') r
                        WHERE m.id = {migration} AND (r ->> 'adds_column')::boolean);
  own_schemas text := (SELECT concat_ws('|', 'pg_temp', 'runbook_', nullif(m.plan ->> 'guard_schema', '')) FROM runbook.migration m WHERE m.id = {migration});
  hashed boolean := (SELECT m.plan ->> 'partition_by' = 'hash' FROM runbook.migration m WHERE m.id = {migration});
  guarded text[] := ARRAY(SELECT g ->> 'index' FROM runbook.migration m, jsonb_array_elements(m.plan -> 'guards') g WHERE m.id = {migration});
BEGIN
  -- Of a partition that lists no values: one that a row of it has.
  FOR part IN SELECT p ->> 'name' FROM ({grown}) m, jsonb_array_elements(m.plan -> 'partitions') p WHERE m.id = {migration} AND p -> 'values' = '[]' LOOP
    EXECUTE (SELECT format('SELECT jsonb_build_object(%L, jsonb_build_array(%I::text)) FROM ONLY %I.%I LIMIT 1',
                           part, m.plan ->> 'key', m.plan -> 'table' ->> 'schema_name', part) FROM runbook.migration m WHERE m.id = {migration}) INTO took;
    held := held || coalesce(took, '{{}}');
  END LOOP;
  FOR trial IN
    WITH t AS (
      SELECT m.plan, m.plan ->> 'key' AS key, to_regclass({root})::text AS root, m.plan -> 'table' ->> 'schema_name' AS schema,
             's.tableoid = ($1 ->> ''table'')::oid AND s.ctid = ($1 ->> ''place'')::tid' AS here,
             'jsonb_build_object(''table'', s.tableoid::bigint, ''place'', s.ctid::text)' AS place,
             k.identity, k.again,
             (SELECT string_agg(quote_ident(c ->> 'name'), ', ' ORDER BY n) FROM jsonb_array_elements(m.plan -> 'columns') WITH ORDINALITY x(c, n)
               WHERE NOT (c ->> 'generated')::boolean) AS columns,
             (SELECT string_agg(CASE WHEN c ->> 'name' = m.plan ->> 'key' THEN '$2::' || (c ->> 'type') ELSE 'NULL' END, ', ' ORDER BY n)
                FROM jsonb_array_elements(m.plan -> 'columns') WITH ORDINALITY x(c, n) WHERE NOT (c ->> 'generated')::boolean) AS only_key,
             (SELECT string_agg(quote_ident(c ->> 'name'), ', ' ORDER BY n) FROM jsonb_array_elements(m.plan -> 'columns') WITH ORDINALITY x(c, n)
               WHERE NOT (c ->> 'generated')::boolean AND c ->> 'name' <> m.plan ->> 'key') AS without_key,
             (SELECT c ->> 'default' FROM jsonb_array_elements(m.plan -> 'columns') c WHERE c ->> 'name' = m.plan ->> 'key') AS "default",
             (SELECT array_agg(e.enumlabel::text) FROM pg_enum e WHERE e.enumtypid = to_regtype(m.plan ->> 'key_type')) AS labels,
             CASE WHEN (m.plan ->> 'server_version')::int > 14 THEN '23503' END AS fault
        FROM ({grown}) m
       CROSS JOIN LATERAL (  -- a row that triggers may write once more is found again by its key
             SELECT 'jsonb_build_object(' || string_agg(format('%L, s.%I::text', c ->> 'name', c ->> 'name'), ', ') || ')' AS identity,
                    string_agg(format('s.%I = ($1 -> ''is'' ->> %L)::%s', c ->> 'name', c ->> 'name', c ->> 'type'), ' AND ') AS again
               FROM jsonb_array_elements(m.plan -> 'columns') c WHERE (m.plan -> 'primary_key') || jsonb_build_array(m.plan -> 'key') ? (c ->> 'name')) k
       WHERE m.id = {migration}),
    target AS (  -- a value of another partition than the row's own
      SELECT CASE WHEN second IS NULL THEN first
                  ELSE format('CASE WHEN s.tableoid = %s THEN %s::%s ELSE %s::%3$s END', leaf, second, key_type, first) END AS another,
             CASE WHEN second IS NULL THEN format('s.tableoid <> %s', leaf) ELSE 'true' END AS movable
        FROM (SELECT t.plan ->> 'key_type' AS key_type, min(v.first) FILTER (WHERE v.n = 1) AS first,
                     min(v.leaf) FILTER (WHERE v.n = 1) AS leaf, min(v.first) FILTER (WHERE v.n = 2) AS second
                FROM t LEFT JOIN LATERAL (
                     SELECT min(quote_literal(v)) AS first, to_regclass(format('%I.%I', t.schema, p ->> 'name'))::oid::bigint AS leaf,
                            row_number() OVER (ORDER BY (p ->> 'rows')::bigint, place) AS n
                       FROM jsonb_array_elements(t.plan -> 'partitions') WITH ORDINALITY p(p, place)
                      CROSS JOIN jsonb_array_elements_text(coalesce(nullif(p -> 'values', '[]'), held -> (p ->> 'name'))) v
                      WHERE v IS NOT NULL GROUP BY p, place) v ON true
               GROUP BY 1) v),
    reference AS (
      SELECT r ->> 'name' AS key_name, r ->> 'table' AS table_name, r ->> 'composite' AS composite,
             r ->> 'composite' NOT LIKE '%ON DELETE CASCADE%' AND r ->> 'composite' NOT LIKE '%ON DELETE SET %' AS keeps, (r ->> 'adds_column')::boolean AS adds_column,
             r.place, k.names, k.joined, k.present, a.columns, a.replaced, format('s.%I = $2::%s', r.r -> 'referenced' ->> 0, a.type) AS known,
             format('r.%I = $2::%s', r.r -> 'columns' ->> 0, a.type) AS as_given,
             format('%s AND r.%I = s.%I', k.joined, r ->> 'role_column', t.key) AS in_step
        FROM t CROSS JOIN jsonb_array_elements(t.plan -> 'references') WITH ORDINALITY r(r, place)
       CROSS JOIN LATERAL (
             SELECT format('%I.%I', r ->> 'schema_name', r ->> 'table') AS names, string_agg(format('r.%I = s.%I', c, d), ' AND ') AS joined,
                    string_agg(format('s.%I IS NOT NULL', c), ' AND ') || format(' AND s.%I IS NOT NULL', r ->> 'role_column') AS present
               FROM ROWS FROM (jsonb_array_elements_text(r -> 'columns'), jsonb_array_elements_text(r -> 'referenced')) AS z(c, d)) k
       CROSS JOIN LATERAL (
             SELECT string_agg(quote_ident(a.attname), ', ' ORDER BY a.attnum) AS columns,
                    string_agg(CASE WHEN a.attname = r -> 'columns' ->> 0 THEN '$2::' || format_type(a.atttypid, a.atttypmod)
                               ELSE quote_ident(a.attname) END, ', ' ORDER BY a.attnum) AS replaced,
                    max(format_type(a.atttypid, a.atttypmod)) FILTER (WHERE a.attname = r -> 'columns' ->> 0) AS type
               FROM pg_attribute a WHERE a.attrelid = to_regclass(k.names) AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = '') a
       WHERE to_regclass(k.names) IS NOT NULL),
    pick AS (SELECT format('SELECT %s FROM %%s s WHERE %%s LIMIT 1 FOR UPDATE OF s SKIP LOCKED', place) AS pick FROM t)
    SELECT 1 AS part, p.place, format('A row of %s can be deleted and inserted again', p ->> 'name') AS promise,
           ARRAY[format(pick, format('%I.%I', schema, p ->> 'name'), 'true')]
           || ARRAY(SELECT format('WITH gone AS (DELETE FROM %s r USING %s s WHERE %s AND %s RETURNING 1) SELECT $1 FROM (SELECT count(*) FROM gone) g',
                           names, root, joined, here) FROM reference WHERE composite LIKE '%ON DELETE RESTRICT%')
           || format('WITH gone AS (DELETE FROM %s s WHERE %s RETURNING *) INSERT INTO %1$s AS s (%3$s) OVERRIDING SYSTEM VALUE SELECT %3$s FROM gone'
                     ' RETURNING jsonb_build_object(''seen'', ''it lies in '' || s.tableoid::regclass || '' again'', ''ok'', s.tableoid = ($1 ->> ''table'')::oid)',
                     root, here, columns) AS steps,
           NULL AS fault, NULL AS refusal, NULL AS key_name, NULL::text[] AS labels
      FROM t, pick, jsonb_array_elements(plan -> 'partitions') WITH ORDINALITY p(p, place)
    UNION ALL
    SELECT 2, 0, format('A row that leaves %s out gets its default', key),
           CASE WHEN plan -> 'findings' @> jsonb_build_array(jsonb_build_object('object', concat(plan -> 'table' ->> 'schema_name', '.', plan -> 'table' ->> 'name', '.', key, ' DEFAULT'))) THEN
             ARRAY['SELECT ''{{"seen": "no partition takes it, as the plan says"}}''::jsonb']
           ELSE ARRAY[
             format(CASE WHEN free IS NULL THEN '%2$s' ELSE 'SELECT coalesce((%1$s), (%2$s))' END, format(pick, root, concat_ws(' AND ', own, free)), format(pick, root, own)),
             format('WITH gone AS (DELETE FROM %s s WHERE %s RETURNING *) INSERT INTO %1$s AS s (%3$s) OVERRIDING SYSTEM VALUE SELECT %3$s FROM gone'
                    ' RETURNING jsonb_build_object(''seen'', ''it lies in '' || s.tableoid::regclass, ''ok'', true)', root, here, without_key)] END, NULL, NULL, NULL, NULL
      FROM t CROSS JOIN pick CROSS JOIN LATERAL (SELECT CASE plan ->> 'partition_by' WHEN 'list' THEN format('s.%I = %s', key, "default") ELSE 'true' END) o(own)
     CROSS JOIN LATERAL (  -- the row will have another key; of so many looked at, for where every row is referred to, all would be
           SELECT format('s.ctid = ANY (ARRAY(SELECT s.ctid FROM %s s WHERE %s LIMIT 1000)) AND ', root, own)
                  || string_agg(format('NOT EXISTS (SELECT FROM %s r WHERE %s)', names, joined), ' AND ') FROM reference) f(free)
     WHERE "default" NOT LIKE '%nextval(%' AND without_key IS NOT NULL  -- that would count
    UNION ALL
    SELECT 2, 1, format('A changed %s moves the row', key),
           CASE WHEN another IS NOT NULL THEN ARRAY[
             format(pick, root, movable),
             format('SELECT $1 || jsonb_build_object(''was'', to_jsonb(s.*)) FROM %s s WHERE %s', root, here),
             format('UPDATE %s s SET %I = %s WHERE %s RETURNING jsonb_build_object(''seen'', concat(''it moved to '', s.tableoid::regclass, (SELECT '', and triggers gave it another ''
                    || string_agg(n.key, '', '' ORDER BY n.key) FROM jsonb_each(to_jsonb(s.*)) n WHERE n.key <> %L AND n.value IS DISTINCT FROM $1 -> ''was'' -> n.key)),'
                    ' ''ok'', s.tableoid <> ($1 ->> ''table'')::oid)', root, key, another, here, key)] END,
           CASE WHEN (SELECT bool_and(adds_column) FROM reference) THEN fault END, NULL, NULL, NULL
      FROM t CROSS JOIN pick LEFT JOIN target ON true
    UNION ALL
    SELECT 3, r.place, format('Rows of %s follow a changed %s by %s', table_name, key, key_name),
           CASE WHEN another IS NOT NULL THEN ARRAY[
             format(pick, root, format('%s AND EXISTS (SELECT FROM %s r WHERE %s)', movable, names, in_step)),
             format('WITH held AS (SELECT FROM %s r JOIN %s s ON %s WHERE %s FOR UPDATE OF r) SELECT $1 || jsonb_build_object(''before'', count(*)) FROM held', names, root, in_step, here),
             format('UPDATE %s s SET %I = %s WHERE %s RETURNING $1 || jsonb_build_object(''is'', %s)', root, key, another, here, t.identity),
             format('SELECT jsonb_build_object(''seen'', format(''%%s rows before, %%s after'', $1 ->> ''before'', count(r.tableoid)), ''ok'', count(r.tableoid) = ($1 ->> ''before'')::bigint)'
                    ' FROM %s s LEFT JOIN %s r ON %s WHERE %s GROUP BY s.tableoid, s.ctid', root, names, in_step, t.again)] END,
           CASE WHEN adds_column THEN fault END, NULL, NULL, NULL
      FROM t CROSS JOIN pick CROSS JOIN reference r LEFT JOIN target ON true
    UNION ALL
    SELECT 4, r.place, format(CASE WHEN keeps THEN 'A row to which rows of %s refer cannot be deleted, as %s says' ELSE 'A row can be deleted, and its rows of %s go as %s says' END,
                              table_name, key_name),
           ARRAY[format(pick, root, format('EXISTS (SELECT FROM %s r WHERE %s)', names, joined)),
                 format('WITH held AS (SELECT r.ctid, r.tableoid FROM %s r JOIN %s s ON %s WHERE %s FOR UPDATE OF r)'
                        ' SELECT $1 || jsonb_build_object(''before'', count(*), ''rows'', array_agg(ctid)::text, ''places'', array_agg(concat(tableoid, ctid))::text) FROM held', names, root, joined, here),
                 format('DELETE FROM %s s WHERE %s RETURNING $1', root, here),
                 format('SELECT jsonb_build_object(''seen'', format(''%%s rows referred to it, %%s do still'', $1 ->> ''before'', count(*)), ''ok'', CASE WHEN count(*) > 0 THEN false WHEN %L THEN true END)'  -- another key may have taken them along
                        ' FROM %s r WHERE r.ctid = ANY (($1 ->> ''rows'')::tid[]) AND concat(r.tableoid, r.ctid) = ANY (($1 ->> ''places'')::text[])', NOT keeps, names)],
           NULL, CASE WHEN keeps THEN 'kept' END, key_name, NULL
      FROM t, pick, reference r
    UNION ALL
    SELECT 4, 0, 'A row can be deleted',
           ARRAY[format(pick, root, 'true'), format('DELETE FROM %s s WHERE %s RETURNING jsonb_build_object(''seen'', ''it is gone'', ''ok'', true)', root, here)],
           NULL, NULL, NULL, NULL
      FROM t, pick WHERE NOT EXISTS (SELECT FROM reference)
    UNION ALL
    SELECT 5, r.place, format('A row of %s that refers to nobody is refused by %s', table_name, key_name),
           ARRAY[format(pick, names, present),
                 format('WITH gone AS (DELETE FROM %s s WHERE %s RETURNING *) INSERT INTO %1$s AS r (%3$s) OVERRIDING SYSTEM VALUE SELECT %4$s FROM gone'
                        ' WHERE NOT EXISTS (SELECT FROM %5$s s WHERE %6$s) RETURNING CASE WHEN %7$s THEN jsonb_build_object(''seen'', ''it was accepted'', ''ok'', false)'
                        ' ELSE jsonb_build_object(''seen'', ''a trigger lets it refer to another'') END',
                        names, here, columns, replaced, root, known, as_given)],
           NULL, '23503', key_name, NULL
      FROM (SELECT key, root, here FROM t) t, pick, reference r
    UNION ALL
    SELECT 6, 0, 'A duplicate in another partition is refused',
           CASE WHEN another IS NOT NULL THEN ARRAY[
             format(pick, root, movable),
             format('INSERT INTO %s (%s) OVERRIDING SYSTEM VALUE SELECT %s FROM %1$s s WHERE %4$s RETURNING jsonb_build_object(''seen'', ''it was accepted'', ''ok'', false)',
                    root, columns,
                    (SELECT string_agg(CASE WHEN c ->> 'name' = key THEN another ELSE format('s.%I', c ->> 'name') END, ', ' ORDER BY n)
                       FROM jsonb_array_elements(plan -> 'columns') WITH ORDINALITY x(c, n) WHERE NOT (c ->> 'generated')::boolean), here)] END,
           NULL, '23505', NULL, NULL
      FROM t CROSS JOIN pick LEFT JOIN target ON true WHERE plan -> 'guards' <> '[]'
    UNION ALL
    SELECT 7, 0, format('A %s that no partition takes is refused', key),
           CASE WHEN plan ->> 'partition_by' <> 'hash' AND NOT EXISTS (SELECT FROM pg_partition_tree({root}) l JOIN pg_class c ON c.oid = l.relid
                      WHERE l.level = 1 AND pg_get_expr(c.relpartbound, c.oid) = 'DEFAULT') THEN
             ARRAY[format('INSERT INTO %s (%s) OVERRIDING SYSTEM VALUE VALUES (%s) RETURNING jsonb_build_object(''seen'', ''it was accepted'', ''ok'', %s)',
                          root, columns, only_key, CASE plan ->> 'partition_by' WHEN 'list' THEN 'false' ELSE 'NULL::boolean' END)] END,
           NULL, '23514', '', labels
      FROM t
    ORDER BY 1, 2
  LOOP
    promise := trial.promise;
    sql := array_to_string(trial.steps, E';\n\n');
    seen := CASE WHEN trial.steps IS NOT NULL THEN 'there is no row, or no value, to try it with'
                 WHEN trial.part < 7 THEN 'no value of another partition is known'
                 WHEN hashed THEN 'by hash every value has a partition' ELSE 'the default partition takes any value' END;
    ok := NULL;
    FOREACH value IN ARRAY CASE WHEN coalesce(trial.refusal, 'kept') = 'kept' THEN ARRAY[NULL::text] ELSE unheard_of || trial.labels END LOOP
      BEGIN
        took := '{{}}';
        FOREACH step IN ARRAY coalesce(trial.steps, '{{}}') LOOP
          EXECUTE step INTO took USING took, value;
          EXIT WHEN took IS NULL;
          seen := 'the row was not found again, or a trigger kept it';
        END LOOP;
        seen := coalesce(took ->> 'seen', seen);
        ok := (took ->> 'ok')::boolean;
        RAISE SQLSTATE 'RB000';
      EXCEPTION WHEN OTHERS THEN
        GET STACKED DIAGNOSTICS cause = CONSTRAINT_NAME, context = PG_EXCEPTION_CONTEXT;
        raised := context ~ '^PL/pgSQL function [^\n]* at RAISE' AND context !~ ('^PL/pgSQL function "?(' || own_schemas || ')');
        -- the application's function in which it was met
        theirs := regexp_replace(substring(context FROM '(?n)^(?:PL/pgSQL|PL/Python|PL/Perl|SQL) function (.*)$'), ' (line [0-9]|statement [0-9]|during ).*$', '');
        theirs := CASE WHEN theirs !~ ('^"?(' || own_schemas || ')') THEN theirs END;
        said := CASE WHEN raised THEN theirs || ' raised an error' ELSE concat(SQLERRM, ', in ' || theirs) END;
        -- from 18 on RESTRICT has an error of its own; the refusal has the name of the key's part on the partition
        IF trial.refusal = 'kept' AND SQLSTATE IN ('23503', '23001') AND EXISTS (
             SELECT FROM pg_constraint k LEFT JOIN pg_constraint p ON p.oid = k.conparentid
              WHERE k.contype = 'f' AND k.conname = cause AND trial.key_name IN (k.conname, p.conname)) OR SQLSTATE = trial.refusal AND (cause = trial.key_name OR trial.key_name IS NULL AND cause = ANY (guarded)) THEN
          seen := format('refused with %s: %s', SQLSTATE, said);
          ok := true;
        ELSIF trial.refusal <> 'kept' AND (SQLSTATE LIKE '22%' OR SQLSTATE IN ('23502', '42601')
              OR SQLSTATE = '23514' AND cause = '' AND trial.refusal <> '23514') THEN
          CONTINUE;  -- not a value of this type, or one that has a partition
        ELSIF SQLSTATE <> 'RB000' THEN
          seen := format('%s: %s', SQLSTATE, said);
          -- What constraints, triggers (whatever they RAISE) or other sessions forbid was not tried, nor a change of GENERATED ALWAYS (428C9); a row without
          -- a partition is a fault, one of the keys that got a role column, and so is the rest.
          ok := CASE WHEN SQLSTATE LIKE '23%' AND (SQLSTATE <> '23514' OR cause <> '')
                       AND (SQLSTATE IS DISTINCT FROM trial.fault OR NOT EXISTS (SELECT FROM unnest(ours) each WHERE starts_with(cause, left(each, 60))))
                       OR SQLSTATE IN ('P0001', '0A000', '55P03', '40001', '40P01', '42501', '428C9') AND SQLERRM NOT LIKE 'moving row to another partition%'
                       -- a default may read what only the application's sessions set
                       OR trial.part = 2 AND trial.place = 0 AND (SQLSTATE <> '23514' OR cause <> '') AND SQLSTATE <> '0A000'
                       OR raised
                       -- nor what a function of the application met, which may read what only its sessions set; but the migration takes ON CONFLICT its key (42P10)
                       OR theirs IS NOT NULL AND SQLSTATE NOT LIKE '23%' AND SQLSTATE <> '42P10' AND SQLERRM NOT LIKE 'moving row to another partition%'
                     THEN NULL ELSE false END;
        END IF;
      END;
      EXIT WHEN ok IS NOT NULL;
    END LOOP;
    RETURN NEXT;
  END LOOP;
END $trials$

-- name: trials
SELECT * FROM pg_temp.trials()

-- name: create_latencies
-- Medians inside the server, planning included, retired table and result in turns; some hundred look-ups. Two of each are
-- measured where they take long, more for a fifth of a second: without its index a rare value costs the retired table a whole scan.
CREATE FUNCTION pg_temp.latencies() RETURNS TABLE (look_up text, retired_ms float8, result_ms float8, times integer) LANGUAGE plpgsql AS $latencies$
#variable_conflict use_column
DECLARE
  plan jsonb := (SELECT m.plan FROM runbook.migration m WHERE m.id = {migration});
  tables text[] := ARRAY[to_regclass({retired})::text, to_regclass({root})::text];
  samples jsonb; look record; conditions text[]; side integer; at timestamptz; begun timestamptz;
BEGIN
  FOR look IN
    (SELECT format('%I = %s', plan ->> 'key', v.first) AS label, NULL AS sampled
       FROM jsonb_array_elements(plan -> 'partitions') p
      CROSS JOIN LATERAL (SELECT min(quote_literal(v)) AS first FROM jsonb_array_elements_text(p -> 'values') v) v
      WHERE v.first IS NOT NULL ORDER BY (p ->> 'rows')::bigint DESC LIMIT 8)
    UNION ALL
    SELECT k.condition, (SELECT string_agg(format('format(''%%I = %%L'', %L, s.%I)', c, c), ', ') FROM unnest(k.columns) c)
      FROM ({unique_keys}) k
  LOOP
    conditions := ARRAY[look.label];
    IF look.sampled IS NOT NULL THEN
      EXECUTE format('SELECT array_agg(c) FROM (SELECT concat_ws('' AND '', %s) AS c FROM %s s TABLESAMPLE SYSTEM (%s) ORDER BY random() LIMIT 40) x',
                     look.sampled, tables[2], {percent}) INTO conditions;
      CONTINUE WHEN conditions IS NULL;
    END IF;
    samples := '[]';
    begun := clock_timestamp();
    FOR round IN 0 .. 40 LOOP
      EXIT WHEN round > 2 AND clock_timestamp() > begun + interval '0.2 s';
      FOR turn IN 0 .. 1 LOOP
        side := 1 + (round + turn) % 2;
        CONTINUE WHEN tables[side] IS NULL;
        at := clock_timestamp();
        EXECUTE format('SELECT * FROM %s WHERE %s LIMIT 100', tables[side], conditions[1 + round % cardinality(conditions)]);
        IF round > 0 THEN  -- the first one fills the caches
          samples := samples || jsonb_build_object('side', side, 'ms', 1000 * extract(epoch FROM clock_timestamp() - at));
        END IF;
      END LOOP;
    END LOOP;
    look_up := look.label;
    SELECT percentile_cont(0.5) WITHIN GROUP (ORDER BY (s ->> 'ms')::float8) FILTER (WHERE s ->> 'side' = '1'),
           percentile_cont(0.5) WITHIN GROUP (ORDER BY (s ->> 'ms')::float8) FILTER (WHERE s ->> 'side' = '2'),
           count(*) FILTER (WHERE s ->> 'side' = '2')
      INTO retired_ms, result_ms, times FROM jsonb_array_elements(samples) s;
    RETURN NEXT;
  END LOOP;
END $latencies$

-- name: latencies
SELECT * FROM pg_temp.latencies()

-- name: looks
-- The last look at each part, and whether it is younger than the last check; one that failed has seen nothing.
SELECT DISTINCT ON (a.action) a.action AS part, a.evidence,
       a.state = 'done' AND a.id > coalesce((SELECT max(c.id) FROM runbook.action c
         WHERE c.migration = {migration} AND c.step = 'verify' AND c.action = 'check'), 0) AS fresh
  FROM runbook.action a WHERE a.migration = {migration} AND a.step = 'verify' AND a.action <> 'check'
 ORDER BY a.action, a.id DESC

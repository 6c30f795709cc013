-- What the plan reads. Nothing here takes more than ACCESS SHARE. Run with search_path = pg_catalog,
-- so that every name that PostgreSQL renders is qualified.

-- name: resolve
-- The tables that a parameter can mean: the exact name first, then schema.name, then SQL notation.
SELECT oid::bigint
  FROM (SELECT c.oid, 1 AS preference, pg_table_is_visible(c.oid) AS visible
          FROM pg_class c WHERE c.relname = {name} AND c.relkind IN ('r', 'p')
        UNION ALL
        SELECT c.oid, 2, true FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
         WHERE n.nspname || '.' || c.relname = {name} AND c.relkind IN ('r', 'p')
        UNION ALL
        SELECT c.oid, 3, true FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
         WHERE {name} IN (quote_ident(n.nspname) || '.' || quote_ident(c.relname), quote_ident(c.relname))
           AND c.relkind IN ('r', 'p')) candidate
 ORDER BY preference, visible DESC, oid

-- name: tables
-- The ordinary tables of the database, to help with a misspelt name.
SELECT n.nspname || '.' || c.relname AS name
  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE c.relkind IN ('r', 'p') AND NOT c.relispartition
   AND n.nspname <> 'information_schema' AND n.nspname NOT LIKE 'pg\_%' AND n.nspname NOT LIKE 'runbook%'

-- name: table
SELECT c.oid::bigint AS oid, n.nspname AS schema, c.relname AS name, c.relkind = 'p' AS partitioned,
       c.relispartition AS is_partition, c.relpersistence = 'u' AS unlogged, pg_get_userbyid(c.relowner) AS owner,
       (SELECT count(*) FROM pg_inherits i WHERE c.oid IN (i.inhrelid, i.inhparent)) AS inheritance,
       c.relrowsecurity AS row_security, c.relforcerowsecurity AS force_row_security,
       c.reltuples::bigint AS estimated_rows, pg_table_size(c.oid) AS table_bytes, pg_indexes_size(c.oid) AS index_bytes,
       coalesce((SELECT spcname FROM pg_tablespace t WHERE t.oid = c.reltablespace), '') AS tablespace,
       coalesce(c.reloptions, '{{}}') || coalesce((SELECT array_agg('toast.' || o) FROM unnest(t.reloptions) o), '{{}}') AS options,
       c.relreplident AS replica_identity,
       (SELECT relname FROM pg_index i JOIN pg_class x ON x.oid = i.indexrelid
         WHERE i.indrelid = c.oid AND i.indisreplident) AS replica_index,
       obj_description(c.oid, 'pg_class') AS comment
  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace LEFT JOIN pg_class t ON t.oid = c.reltoastrelid
 WHERE c.oid = {oid}

-- name: columns
-- `compared` is what the comparison hashes: the value where equality means the same bytes, else its text.
SELECT a.attname AS name, format_type(a.atttypid, a.atttypmod) AS type, a.attnotnull AS not_null,
       a.attgenerated <> '' AS generated, a.attidentity AS identity,
       pg_get_expr(d.adbin, d.adrelid) AS default, a.attnum AS position,
       CASE WHEN t.typname IN ('text', 'varchar') AND coalesce(co.collisdeterministic, true) THEN 'text'
            WHEN t.typname IN ('int2', 'int4', 'int8', 'bool', 'uuid', 'timestamp', 'timestamptz') THEN t.typname::text
            WHEN t.typname IN ('date', 'time', 'oid', 'name', 'bytea', '"char"', 'inet', 'cidr', 'macaddr', 'macaddr8') OR t.typtype = 'e'
            THEN 'value'
            WHEN t.typcollation <> 0 THEN 'collated text' ELSE 'text' END AS compared,
       pg_get_serial_sequence(quote_ident(n.nspname) || '.' || quote_ident(c.relname), a.attname) AS sequence,
       (SELECT sc.relname FROM pg_depend sd JOIN pg_class sc ON sc.oid = sd.objid AND sc.relkind = 'S'
         WHERE sd.refobjid = a.attrelid AND sd.refobjsubid = a.attnum AND sd.deptype = 'i' AND sd.classid = 'pg_class'::regclass) AS identity_sequence,
       (SELECT format('START WITH %s INCREMENT BY %s MINVALUE %s MAXVALUE %s CACHE %s %s', q.seqstart, q.seqincrement, q.seqmin, q.seqmax, q.seqcache,
                      CASE WHEN q.seqcycle THEN 'CYCLE' ELSE 'NO CYCLE' END)
          FROM pg_sequence q WHERE a.attidentity <> '' AND q.seqrelid = pg_get_serial_sequence(quote_ident(n.nspname) || '.' || quote_ident(c.relname), a.attname)::regclass) AS identity_options,
       to_jsonb(a) ->> 'attstattarget' AS statistics, a.attoptions AS options
  FROM pg_attribute a
  JOIN pg_class c ON c.oid = a.attrelid JOIN pg_namespace n ON n.oid = c.relnamespace
  JOIN pg_type declared ON declared.oid = a.atttypid
  JOIN pg_type t ON t.oid = CASE WHEN declared.typtype = 'd' THEN declared.typbasetype ELSE declared.oid END
  LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
  LEFT JOIN pg_collation co ON co.oid = a.attcollation
 WHERE a.attrelid = {oid} AND a.attnum > 0 AND NOT a.attisdropped
 ORDER BY a.attnum

-- name: indexes
-- `tail` is the definition from its method on: the same for any table and any name.
SELECT x.relname AS name, i.indisunique AS unique, i.indisprimary AS primary, i.indisvalid AS valid,
       i.indisclustered AS clustered,
       (SELECT array_agg(a.attname ORDER BY k.ord) FROM unnest(i.indkey::int2[]) WITH ORDINALITY k(attnum, ord)
          JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.attnum WHERE k.ord <= i.indnkeyatts) AS columns,
       0 = ANY (i.indkey::int2[]) AS has_expression, i.indpred IS NOT NULL AS partial,
       substr(d.definition, length(d.prefix) + 1) AS tail, left(d.definition, length(d.prefix)) = d.prefix AS understood,
       coalesce((SELECT spcname FROM pg_tablespace t WHERE t.oid = x.reltablespace), '') AS tablespace,
       k.conname AS constraint, k.contype AS constraint_type, pg_get_constraintdef(k.oid) AS constraint_definition,
       coalesce(k.condeferrable, false) AS deferrable, coalesce(k.condeferred, false) AS deferred,
       obj_description(x.oid, 'pg_class') AS comment, obj_description(k.oid, 'pg_constraint') AS constraint_comment,
       pg_relation_size(x.oid) AS bytes
  FROM pg_index i JOIN pg_class x ON x.oid = i.indexrelid
  JOIN pg_class c ON c.oid = i.indrelid JOIN pg_namespace n ON n.oid = c.relnamespace
  LEFT JOIN pg_constraint k ON k.conindid = i.indexrelid AND k.conrelid = i.indrelid AND k.contype IN ('p', 'u', 'x')
  CROSS JOIN LATERAL (
    SELECT pg_get_indexdef(i.indexrelid) AS definition,
           'CREATE ' || CASE WHEN i.indisunique THEN 'UNIQUE ' ELSE '' END || 'INDEX ' || quote_ident(x.relname) || ' ON '
           || CASE WHEN c.relkind = 'p' THEN 'ONLY ' ELSE '' END
           || quote_ident(n.nspname) || '.' || quote_ident(c.relname) || ' USING ' AS prefix) d
 WHERE i.indrelid = {oid}
 ORDER BY i.indisprimary DESC, x.relname

-- name: checks
SELECT conname AS name, pg_get_constraintdef(oid) AS definition, convalidated AS validated, connoinherit AS no_inherit,
       obj_description(oid, 'pg_constraint') AS comment
  FROM pg_constraint WHERE conrelid = {oid} AND contype = 'c' ORDER BY conname

-- name: outgoing
-- Foreign keys of the table itself.
SELECT k.conname AS name, pg_get_constraintdef(k.oid) AS definition, k.convalidated AS validated,
       n.nspname AS referenced_schema, c.relname AS referenced_table, obj_description(k.oid, 'pg_constraint') AS comment
  FROM pg_constraint k JOIN pg_class c ON c.oid = k.confrelid JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE k.conrelid = {oid} AND k.contype = 'f' AND k.conparentid = 0
 ORDER BY k.conname

-- name: incoming
-- conparentid = 0: on 14 to 17 the children of a key to a partitioned table have rows of their own.
SELECT k.conname AS name, pg_get_constraintdef(k.oid) AS definition, k.convalidated AS validated,
       c.oid::bigint AS oid, n.nspname AS schema, c.relname AS table, c.relkind = 'p' AS partitioned,
       pg_get_userbyid(c.relowner) AS owner,
       c.oid = k.confrelid AS self, c.reltuples::bigint AS estimated_rows,
       (SELECT array_agg(a.attname ORDER BY u.ord) FROM unnest(k.conkey) WITH ORDINALITY u(attnum, ord)
          JOIN pg_attribute a ON a.attrelid = k.conrelid AND a.attnum = u.attnum) AS columns,
       (SELECT array_agg(a.attname ORDER BY u.ord) FROM unnest(k.confkey) WITH ORDINALITY u(attnum, ord)
          JOIN pg_attribute a ON a.attrelid = k.confrelid AND a.attnum = u.attnum) AS referenced,
       (SELECT bool_and(a.attnotnull) FROM pg_attribute a
         WHERE a.attrelid = k.conrelid AND a.attnum = ANY (k.conkey)) AS not_null,
       k.confdeltype AS on_delete, k.confupdtype AS on_update, k.confmatchtype AS match,
       k.condeferrable AS deferrable, k.condeferred AS deferred,
       (SELECT array_agg(a.attname ORDER BY u.ord) FROM unnest(translate(to_jsonb(k) ->> 'confdelsetcols', '[]', '{{}}')::int2[])
               WITH ORDINALITY u(attnum, ord)
          JOIN pg_attribute a ON a.attrelid = k.conrelid AND a.attnum = u.attnum) AS delete_columns,
       EXISTS (SELECT FROM pg_index i WHERE i.indrelid = k.conrelid AND i.indisvalid AND i.indpred IS NULL
                  AND i.indkey[0] = ANY (k.conkey)) AS indexed,
       (SELECT array_agg(a.attname) FROM pg_attribute a WHERE a.attrelid = k.conrelid AND a.attnum > 0 AND NOT a.attisdropped) AS all_columns,
       (SELECT array_agg(t.tgname ORDER BY t.tgname) FROM pg_trigger t WHERE t.tgrelid = k.conrelid AND NOT t.tgisinternal
           AND t.tgname NOT LIKE 'runbook\_%' AND t.tgtype & 16 = 16) AS update_triggers,
       obj_description(k.oid, 'pg_constraint') AS comment
  FROM pg_constraint k JOIN pg_class c ON c.oid = k.conrelid JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE k.confrelid = {oid} AND k.contype = 'f' AND k.conparentid = 0
 ORDER BY n.nspname, c.relname, k.conname

-- name: views
-- Views that read the table, with the text that re-points them once the names are swapped.
SELECT DISTINCT n.nspname AS schema, v.relname AS name, v.relkind = 'm' AS materialized,
       pg_get_userbyid(v.relowner) AS owner,
       'CREATE OR REPLACE VIEW ' || quote_ident(n.nspname) || '.' || quote_ident(v.relname)
       || coalesce(' WITH (' || array_to_string(v.reloptions, ', ') || ')', '') || ' AS ' || pg_get_viewdef(v.oid) AS definition
  FROM pg_depend d JOIN pg_rewrite r ON r.oid = d.objid AND d.classid = 'pg_rewrite'::regclass
  JOIN pg_class v ON v.oid = r.ev_class JOIN pg_namespace n ON n.oid = v.relnamespace
 WHERE d.refclassid = 'pg_class'::regclass AND d.refobjid = {oid} AND v.oid <> {oid} AND v.relkind IN ('v', 'm')
 ORDER BY n.nspname, v.relname

-- name: carried
-- What a new table of the same name must be given, each as the statement that gives it, and how the retired one is
-- relieved of it (`retire`) and gets it back (`restore`). Rendered by the server, with names quoted by the server.
WITH source AS (
  SELECT c.*, quote_ident(n.nspname) || '.' || quote_ident(c.relname) AS qualified
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = {oid})
SELECT 'trigger' AS kind, t.tgname::text AS name,
       pg_get_triggerdef(t.oid) || CASE t.tgenabled WHEN 'O' THEN '' ELSE
         format('; ALTER TABLE %s %s TRIGGER %I', s.qualified,
                CASE t.tgenabled WHEN 'D' THEN 'DISABLE' WHEN 'R' THEN 'ENABLE REPLICA' ELSE 'ENABLE ALWAYS' END, t.tgname) END
       || coalesce(format('; COMMENT ON TRIGGER %I ON %s IS %L', t.tgname, s.qualified, obj_description(t.oid, 'pg_trigger')), '') AS definition,
       format('ALTER TABLE %s DISABLE TRIGGER %I', s.qualified, t.tgname) AS retire,
       format('ALTER TABLE %s %s TRIGGER %I', s.qualified,
              CASE t.tgenabled WHEN 'O' THEN 'ENABLE' WHEN 'D' THEN 'DISABLE' WHEN 'R' THEN 'ENABLE REPLICA' ELSE 'ENABLE ALWAYS' END, t.tgname) AS restore
  FROM pg_trigger t, source s WHERE t.tgrelid = s.oid AND NOT t.tgisinternal AND t.tgname NOT LIKE 'runbook\_%'
UNION ALL
SELECT 'policy', p.polname::text,
       format('CREATE POLICY %I ON %s AS %s FOR %s TO %s%s%s', p.polname, s.qualified,
              CASE WHEN p.polpermissive THEN 'PERMISSIVE' ELSE 'RESTRICTIVE' END,
              CASE p.polcmd WHEN 'r' THEN 'SELECT' WHEN 'a' THEN 'INSERT' WHEN 'w' THEN 'UPDATE' WHEN 'd' THEN 'DELETE' ELSE 'ALL' END,
              (SELECT string_agg(CASE r WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(r)) END, ', ') FROM unnest(p.polroles) r),
              coalesce(' USING (' || pg_get_expr(p.polqual, p.polrelid) || ')', ''),
              coalesce(' WITH CHECK (' || pg_get_expr(p.polwithcheck, p.polrelid) || ')', ''))
       || coalesce(format('; COMMENT ON POLICY %I ON %s IS %L', p.polname, s.qualified, obj_description(p.oid, 'pg_policy')), ''), NULL, NULL
  FROM pg_policy p, source s WHERE p.polrelid = s.oid
UNION ALL
SELECT 'row security', 'enabled', format('ALTER TABLE %s ENABLE ROW LEVEL SECURITY', qualified), NULL, NULL FROM source WHERE relrowsecurity
UNION ALL
SELECT 'row security', 'forced', format('ALTER TABLE %s FORCE ROW LEVEL SECURITY', qualified), NULL, NULL FROM source WHERE relforcerowsecurity
UNION ALL
SELECT 'rule', r.rulename::text, pg_get_ruledef(r.oid)
       || CASE r.ev_enabled WHEN 'O' THEN '' ELSE format('; ALTER TABLE %s %s RULE %I', s.qualified,
            CASE r.ev_enabled WHEN 'D' THEN 'DISABLE' WHEN 'R' THEN 'ENABLE REPLICA' ELSE 'ENABLE ALWAYS' END, r.rulename) END,
       format('ALTER TABLE %s DISABLE RULE %I', s.qualified, r.rulename),
       format('ALTER TABLE %s %s RULE %I', s.qualified,
              CASE r.ev_enabled WHEN 'O' THEN 'ENABLE' WHEN 'D' THEN 'DISABLE' WHEN 'R' THEN 'ENABLE REPLICA' ELSE 'ENABLE ALWAYS' END, r.rulename)
  FROM pg_rewrite r, source s WHERE r.ev_class = s.oid
UNION ALL
SELECT 'grant', coalesce(nullif(a.grantee::regrole::text, '-'), 'PUBLIC') || ' ' || string_agg(a.privilege_type, ', ' ORDER BY a.privilege_type),
       format('GRANT %s ON %s TO %s%s', string_agg(a.privilege_type, ', ' ORDER BY a.privilege_type), s.qualified,
              CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(a.grantee)) END,
              CASE WHEN a.is_grantable THEN ' WITH GRANT OPTION' ELSE '' END), NULL, NULL
  FROM source s CROSS JOIN LATERAL aclexplode(s.relacl) a WHERE a.grantee <> s.relowner
 GROUP BY s.qualified, a.grantee, a.is_grantable
UNION ALL
SELECT 'grant', 'columns of ' || coalesce(nullif(x.grantee::regrole::text, '-'), 'PUBLIC') || ' ' || x.privilege_type,
       format('GRANT %s (%s) ON %s TO %s%s', x.privilege_type, string_agg(quote_ident(a.attname), ', ' ORDER BY a.attnum), s.qualified,
              CASE x.grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(x.grantee)) END,
              CASE WHEN x.is_grantable THEN ' WITH GRANT OPTION' ELSE '' END), NULL, NULL
  FROM source s JOIN pg_attribute a ON a.attrelid = s.oid AND NOT a.attisdropped CROSS JOIN LATERAL aclexplode(a.attacl) x
 WHERE x.grantee <> s.relowner
 GROUP BY s.qualified, x.grantee, x.privilege_type, x.is_grantable
UNION ALL
SELECT 'publication', p.pubname::text,
       format('ALTER PUBLICATION %I ADD TABLE ONLY %s%s%s', p.pubname, s.qualified,
              (SELECT ' (' || string_agg(quote_ident(a.attname), ', ' ORDER BY a.attnum) || ')' FROM pg_attribute a
                WHERE a.attrelid = s.oid AND a.attnum::text = ANY (string_to_array(to_jsonb(r) ->> 'prattrs', ' '))),
              coalesce(' WHERE (' || pg_get_expr((to_jsonb(r) ->> 'prqual')::pg_node_tree, s.oid) || ')', '')),
       format('ALTER PUBLICATION %I DROP TABLE %s', p.pubname, s.qualified), NULL
  FROM pg_publication_rel r JOIN pg_publication p ON p.oid = r.prpubid, source s WHERE r.prrelid = s.oid
UNION ALL
SELECT 'statistics', x.stxname::text, pg_get_statisticsobjdef(x.oid), 
       format('ALTER STATISTICS %I.%I RENAME TO %I', n.nspname, x.stxname, left(x.stxname, 40) || '_retired'), 
       format('ALTER STATISTICS %I.%I RENAME TO %I', n.nspname, left(x.stxname, 40) || '_retired', x.stxname)
  FROM pg_statistic_ext x JOIN pg_namespace n ON n.oid = x.stxnamespace, source s WHERE x.stxrelid = s.oid
ORDER BY 1, 2

-- name: others
-- Everything else that depends on the table, its row type or its primary key: what nobody carries must stop the plan.
SELECT pg_describe_object(d.classid, d.objid, d.objsubid) AS object
  FROM pg_depend d
 WHERE d.deptype IN ('n', 'a')
   AND (d.refclassid = 'pg_class'::regclass AND d.refobjid = {oid}
        OR d.refclassid = 'pg_type'::regclass AND d.refobjid IN (SELECT t FROM pg_class c, pg_type y,
             LATERAL (VALUES (y.oid), (y.typarray)) v(t) WHERE c.oid = {oid} AND y.oid = c.reltype)
        OR d.refclassid = 'pg_constraint'::regclass AND d.refobjid IN (SELECT oid FROM pg_constraint WHERE conrelid = {oid}))
   AND NOT (d.classid = 'pg_class'::regclass AND d.objid IN (SELECT indexrelid FROM pg_index WHERE indrelid = {oid}))
   AND NOT (d.classid = 'pg_class'::regclass AND d.objid = {oid})  -- a generated column, on 14
   AND NOT (d.classid = 'pg_class'::regclass AND (SELECT relkind FROM pg_class WHERE oid = d.objid) IN ('S', 't'))
   AND NOT (d.classid = 'pg_type'::regclass)
   AND d.classid NOT IN ('pg_attrdef'::regclass, 'pg_trigger'::regclass, 'pg_policy'::regclass, 'pg_statistic_ext'::regclass,
                         'pg_publication_rel'::regclass)
   AND NOT (d.classid = 'pg_constraint'::regclass AND (SELECT contype FROM pg_constraint WHERE oid = d.objid) IN ('c', 'p', 'u', 'x', 'n'))
   AND NOT (d.classid = 'pg_constraint'::regclass AND (SELECT contype FROM pg_constraint WHERE oid = d.objid) = 'f')
   AND NOT (d.classid = 'pg_rewrite'::regclass
            AND (SELECT c.relkind FROM pg_rewrite r JOIN pg_class c ON c.oid = r.ev_class WHERE r.oid = d.objid) IN ('v', 'm')
            AND d.refclassid = 'pg_class'::regclass)
   AND NOT (d.classid = 'pg_rewrite'::regclass AND (SELECT ev_class FROM pg_rewrite WHERE oid = d.objid) = {oid})
 GROUP BY 1 ORDER BY 1

-- name: key_values
SELECT {key}::text AS value, count(*) AS rows FROM ONLY {table} GROUP BY {key} ORDER BY count(*) DESC, 1

-- name: privileges
-- What the role that runs this may do; the plan says which GRANT is missing.
SELECT pg_has_role(c.relowner, 'USAGE') AS owner, pg_get_userbyid(c.relowner) AS owner_name, current_user AS me,
       has_schema_privilege(n.oid, 'CREATE') AS schema_create, has_database_privilege(current_database(), 'CREATE') AS database_create,
       current_database() AS database,
       (SELECT rolsuper FROM pg_roles WHERE rolname = current_user) AS superuser,
       pg_has_role('pg_read_all_stats', 'USAGE') AS sees_activity
  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = {oid}

-- name: owned
SELECT pg_has_role(c.relowner, 'USAGE') AS owned FROM pg_class c WHERE c.oid = {oid}

-- name: relations
-- Names in a schema that are taken: tables, indexes, sequences, views.
SELECT relname AS name FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = {schema}

-- name: publications
-- FOR ALL TABLES would publish the shadow, too.
SELECT pubname AS name, puballtables AS all_tables, pubviaroot AS via_root,
       EXISTS (SELECT FROM pg_publication_rel r WHERE r.prpubid = p.oid AND r.prrelid = {oid}) AS member
  FROM pg_publication p

-- name: subscribed
SELECT s.subname AS name FROM pg_subscription_rel r JOIN pg_subscription s ON s.oid = r.srsubid WHERE r.srrelid = {oid}

-- name: definition
-- A fingerprint of all that a plan rests on; the log's own triggers are not part of it.
SELECT md5(string_agg(line, E'\n' ORDER BY line)) AS fingerprint FROM (
  SELECT concat_ws(' ', 'column', a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull, a.attidentity, a.attgenerated,
                   pg_get_expr(d.adbin, d.adrelid)) AS line
    FROM pg_attribute a LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
   WHERE a.attrelid = {oid} AND a.attnum > 0 AND NOT a.attisdropped
  UNION ALL
  SELECT concat_ws(' ', 'index', pg_get_indexdef(indexrelid), indisvalid) FROM pg_index WHERE indrelid = {oid}
  UNION ALL
  SELECT concat_ws(' ', 'constraint', conname, pg_get_constraintdef(oid), convalidated, conrelid::regclass) FROM pg_constraint
   WHERE conrelid = {oid} OR confrelid = {oid} AND conparentid = 0
  UNION ALL
  SELECT concat_ws(' ', 'trigger', pg_get_triggerdef(oid), tgenabled) FROM pg_trigger
   WHERE tgrelid = {oid} AND NOT tgisinternal AND tgname NOT LIKE 'runbook\_%'
  UNION ALL
  SELECT concat_ws(' ', 'policy', polname, pg_get_expr(polqual, polrelid), pg_get_expr(polwithcheck, polrelid), polcmd, polroles)
    FROM pg_policy WHERE polrelid = {oid}
  UNION ALL
  SELECT concat_ws(' ', 'table', relname, relnamespace::regnamespace, relrowsecurity, relforcerowsecurity, relreplident, relacl,
                   pg_get_userbyid(relowner)) FROM pg_class WHERE oid = {oid}
  UNION ALL
  SELECT DISTINCT concat_ws(' ', 'view', r.ev_class::regclass, pg_get_ruledef(r.oid)) FROM pg_depend d JOIN pg_rewrite r ON r.oid = d.objid
   WHERE d.classid = 'pg_rewrite'::regclass AND d.refclassid = 'pg_class'::regclass AND d.refobjid = {oid}) part

-- name: filenode
-- Which file the table lies in: another one means rewritten or truncated, and that the copy must start again.
SELECT pg_relation_filenode({oid}::oid)

-- name: guards
-- Unique keys that lack the partition key: the name, expression, collation and operator class of each part; and the columns
-- that they are made of.
SELECT x.relname AS index, p.parts, pg_get_expr(i.indpred, i.indrelid) AS predicate,
       coalesce((to_jsonb(i) ->> 'indnullsnotdistinct')::boolean, false) AS nulls_not_distinct, NOT i.indimmediate AS deferrable,
       ARRAY(SELECT a.attname::text FROM pg_attribute a WHERE a.attrelid = i.indrelid AND a.attnum > 0 AND (a.attnum = ANY (i.indkey::int2[])
                OR EXISTS (SELECT FROM pg_depend g WHERE g.classid = 'pg_class'::regclass AND g.objid = i.indexrelid
                              AND g.refobjid = i.indrelid AND g.refobjsubid = a.attnum)) ORDER BY a.attnum) AS watched
  FROM pg_index i JOIN pg_class x ON x.oid = i.indexrelid
 CROSS JOIN LATERAL (
       SELECT jsonb_agg(jsonb_build_array('k' || n, pg_get_indexdef(i.indexrelid, n, false),
                concat_ws(' ', 'COLLATE ' || (SELECT format('%I.%I', cn.nspname, c.collname) FROM pg_collation c JOIN pg_namespace cn ON cn.oid = c.collnamespace
                                               WHERE c.oid = i.indcollation[n - 1]),
                          (SELECT format('%I.%I', o.nspname, c.opcname) FROM pg_opclass c JOIN pg_namespace o ON o.oid = c.opcnamespace
                            WHERE c.oid = i.indclass[n - 1] AND NOT c.opcdefault))) ORDER BY n) AS parts
         FROM generate_series(1, i.indnkeyatts) n) p
 WHERE i.indrelid = {oid} AND i.indisunique AND i.indisvalid
   AND NOT EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = i.indrelid AND a.attname = {key} AND a.attnum = ANY (i.indkey[0:i.indnkeyatts - 1]))
 ORDER BY i.indisprimary DESC, x.relname

-- name: schemas
SELECT nspname::text AS name FROM pg_namespace

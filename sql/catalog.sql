-- What the plan reads. Nothing here takes more than ACCESS SHARE. Run with search_path = pg_catalog,
-- so that every name that PostgreSQL renders is qualified.

-- name: resolve
-- The tables that a parameter can mean: the exact name first, then schema.name, then SQL notation.
SELECT c.oid::bigint AS oid, n.nspname AS schema, pg_table_is_visible(c.oid) AS visible,
       CASE {name} WHEN c.relname THEN 1 WHEN n.nspname || '.' || c.relname THEN 2 ELSE 3 END AS preference
  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE c.relkind IN ('r', 'p') AND n.nspname !~ '^runbook_\d+$' AND {name} IN (c.relname, n.nspname || '.' || c.relname, quote_ident(c.relname),
                                              quote_ident(n.nspname) || '.' || quote_ident(c.relname))
 ORDER BY c.relpersistence = 't', preference, visible DESC, c.oid

-- name: there
SELECT to_regclass({name}) IS NOT NULL

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
       obj_description(c.oid, 'pg_class') AS comment,
       -- Whom default privileges would give rights on a new table: the source's own grants are to be the only ones.
       coalesce((SELECT array_agg(DISTINCT CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(a.grantee)) END)
          FROM pg_default_acl d CROSS JOIN LATERAL aclexplode(d.defaclacl) a
         WHERE d.defaclrole = current_user::regrole AND d.defaclnamespace IN (0, n.oid) AND d.defaclobjtype IN ('r', 'S')
           AND a.grantee <> d.defaclrole), '{{}}') AS strangers
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
       to_jsonb(a) ->> 'attstattarget' AS statistics, a.attoptions AS options,
       concat_ws(' ', nullif(a.attcollation, t.typcollation)::regcollation, a.attstorage, to_jsonb(a) ->> 'attcompression', a.attoptions,
                 nullif(to_jsonb(a) ->> 'attstattarget', '-1'), col_description(a.attrelid, a.attnum)) AS kept
  FROM pg_attribute a
  JOIN pg_class c ON c.oid = a.attrelid JOIN pg_namespace n ON n.oid = c.relnamespace
  JOIN pg_type declared ON declared.oid = a.atttypid
  JOIN pg_type t ON t.oid = CASE WHEN declared.typtype = 'd' THEN declared.typbasetype ELSE declared.oid END
  LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
  LEFT JOIN pg_collation co ON co.oid = a.attcollation
 WHERE a.attrelid = {oid} AND a.attnum > 0 AND NOT a.attisdropped
 ORDER BY a.attnum

-- name: indexes
-- `tail` is the definition from its method on: the same for any table and any name. In the order of their making, in which
-- PostgreSQL asks them about a new row: the first that refuses it gives the error its name.
SELECT x.relname AS name, i.indisunique AS unique, i.indisprimary AS primary, i.indisvalid AS valid,
       i.indisclustered AS clustered,
       (SELECT array_agg(a.attname ORDER BY k.ord) FROM unnest(i.indkey::int2[]) WITH ORDINALITY k(attnum, ord)
          JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.attnum WHERE k.ord <= i.indnkeyatts) AS columns,
       0 = ANY (i.indkey::int2[]) AS has_expression, i.indpred IS NOT NULL AS partial,
       left(rest.tail, length(rest.tail) - length(rest.predicate)) || coalesce(' TABLESPACE ' || quote_ident(space.spcname), '') || rest.predicate AS tail,
       (SELECT coalesce(' INCLUDE (' || string_agg(quote_ident(a.attname), ', ' ORDER BY k.ord) || ')', '') FROM unnest(i.indkey::int2[]) WITH ORDINALITY k(attnum, ord)
          JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.attnum WHERE k.ord > i.indnkeyatts) AS include,
       coalesce((SELECT ' WITH (' || string_agg(split_part(o, '=', 1) || '=' || quote_literal(substr(o, strpos(o, '=') + 1)), ', ') || ')' FROM unnest(x.reloptions) o), '') AS options,
       coalesce(' USING INDEX TABLESPACE ' || quote_ident(space.spcname), '') AS index_space,
       (SELECT jsonb_object_agg(a.attnum, to_jsonb(a) -> 'attstattarget') FROM pg_attribute a
         WHERE a.attrelid = x.oid AND (to_jsonb(a) ->> 'attstattarget')::int >= 0) AS statistics,
       i.indisreplident AS replica_identity,
       k.conname AS constraint, k.contype AS constraint_type, pg_get_constraintdef(k.oid) AS constraint_definition,
       obj_description(x.oid, 'pg_class') AS comment, obj_description(k.oid, 'pg_constraint') AS constraint_comment
  FROM pg_index i JOIN pg_class x ON x.oid = i.indexrelid
  JOIN pg_class c ON c.oid = i.indrelid JOIN pg_namespace n ON n.oid = c.relnamespace
  LEFT JOIN pg_constraint k ON k.conindid = i.indexrelid AND k.conrelid = i.indrelid AND k.contype IN ('p', 'u', 'x')
  LEFT JOIN pg_tablespace space ON space.oid = x.reltablespace
  CROSS JOIN LATERAL (
    SELECT substr(pg_get_indexdef(i.indexrelid), 1 + length(
             'CREATE ' || CASE WHEN i.indisunique THEN 'UNIQUE ' ELSE '' END || 'INDEX ' || quote_ident(x.relname) || ' ON '
             || CASE WHEN c.relkind = 'p' THEN 'ONLY ' ELSE '' END
             || quote_ident(n.nspname) || '.' || quote_ident(c.relname) || ' USING ')) AS tail,
           coalesce(' WHERE ' || pg_get_expr(i.indpred, i.indrelid), '') AS predicate) rest
 WHERE i.indrelid = {oid}
 ORDER BY i.indexrelid

-- name: checks
SELECT conname AS name, pg_get_constraintdef(oid) AS definition, convalidated AS validated, connoinherit AS no_inherit,
       obj_description(oid, 'pg_constraint') AS comment
  FROM pg_constraint WHERE conrelid = {oid} AND contype = 'c' ORDER BY conname

-- name: outgoing
-- Foreign keys of the table itself.
SELECT k.conname AS name, pg_get_constraintdef(k.oid) AS definition, k.convalidated AS validated,
       n.nspname AS referenced_schema, c.relname AS referenced_table,
       (SELECT array_agg(a.attname ORDER BY u.ord) FROM unnest(k.conkey) WITH ORDINALITY u(attnum, ord)
          JOIN pg_attribute a ON a.attrelid = k.conrelid AND a.attnum = u.attnum) AS columns,
       (SELECT a.attname FROM pg_attribute a WHERE a.attrelid = k.confrelid AND a.attnum = k.confkey[1]) AS referenced,
       obj_description(k.oid, 'pg_constraint') AS comment
  FROM pg_constraint k JOIN pg_class c ON c.oid = k.confrelid JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE k.conrelid = {oid} AND k.contype = 'f' AND k.conparentid = 0
 ORDER BY k.conname

-- name: incoming
-- conparentid = 0: on 14 to 17 the children of a key to a partitioned table have rows of their own.
SELECT k.conname AS name, pg_get_constraintdef(k.oid) AS definition, k.convalidated AS validated,
       c.oid::bigint AS oid, n.nspname AS schema, c.relname AS table, c.relkind = 'p' AS partitioned, c.relispartition AS is_partition,
       c.relkind = 'r' AND EXISTS (SELECT FROM pg_inherits i WHERE i.inhparent = c.oid) AS inherited,
       pg_get_userbyid(c.relowner) AS owner,
       c.oid = k.confrelid AS self, c.reltuples::bigint AS estimated_rows,
       (SELECT array_agg(a.attname ORDER BY u.ord) FROM unnest(k.conkey) WITH ORDINALITY u(attnum, ord)
          JOIN pg_attribute a ON a.attrelid = k.conrelid AND a.attnum = u.attnum) AS columns,
       (SELECT array_agg(a.attname ORDER BY u.ord) FROM unnest(k.confkey) WITH ORDINALITY u(attnum, ord)
          JOIN pg_attribute a ON a.attrelid = k.confrelid AND a.attnum = u.attnum) AS referenced,
       (SELECT array_agg(format('OPERATOR(%I.%s)', os.nspname, o.oprname) ORDER BY u.ord) FROM unnest(k.conpfeqop) WITH ORDINALITY u(op, ord)
          JOIN pg_operator o ON o.oid = u.op JOIN pg_namespace os ON os.oid = o.oprnamespace) AS operators,
       (SELECT bool_and(a.attnotnull) FROM pg_attribute a
         WHERE a.attrelid = k.conrelid AND a.attnum = ANY (k.conkey)) AS not_null,
       k.confdeltype AS on_delete, k.confupdtype AS on_update, k.confmatchtype AS match,
       k.condeferrable AS deferrable, k.condeferred AS deferred,
       (SELECT array_agg(a.attname ORDER BY u.ord) FROM unnest(translate(to_jsonb(k) ->> 'confdelsetcols', '[]', '{{}}')::int2[])
               WITH ORDINALITY u(attnum, ord)
          JOIN pg_attribute a ON a.attrelid = k.conrelid AND a.attnum = u.attnum) AS delete_columns,
       EXISTS (SELECT FROM pg_index i WHERE i.indrelid = k.conrelid AND i.indisvalid AND i.indkey[0] = ANY (k.conkey)
                  AND (i.indpred IS NULL OR pg_get_expr(i.indpred, i.indrelid) = (  -- which = implies
                       SELECT format('(%I IS NOT NULL)', a.attname) FROM pg_attribute a WHERE a.attrelid = i.indrelid AND a.attnum = i.indkey[0]))) AS indexed,
       (SELECT array_agg(a.attname) FROM pg_attribute a WHERE a.attrelid = k.conrelid AND a.attnum > 0 AND NOT a.attisdropped) AS all_columns,
       (SELECT array_agg(t.tgname ORDER BY t.tgname) FROM pg_trigger t WHERE t.tgrelid = k.conrelid AND NOT t.tgisinternal
           AND t.tgname NOT LIKE ALL ('{{runbook\\_%,zzz\\_runbook\\_%,~runbook\\_%}}') AND t.tgtype & 16 = 16 AND t.tgenabled <> 'D'
           AND t.tgattr = ''  -- no list of columns has one that is new; nor the guards' of an earlier migration
           AND NOT EXISTS (SELECT FROM pg_proc p WHERE p.oid = t.tgfoid AND p.prosecdef AND 'enable_seqscan=off' = ANY (p.proconfig))) AS update_triggers,
       -- What does not bear that the table gains a column.
       EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = k.conrelid AND a.attnum = ANY (k.conkey) AND a.attgenerated <> '') AS computed,
       (SELECT max(attnum) FROM pg_attribute a WHERE a.attrelid = k.conrelid) AS last_column,
       EXISTS (SELECT FROM (SELECT c.oid UNION SELECT relid FROM pg_partition_tree(c.oid)) t(oid) JOIN pg_class l USING (oid) JOIN pg_namespace ln ON ln.oid = l.relnamespace
                WHERE l.relkind = 'r' AND (l.relreplident = 'n' OR l.relreplident = 'd' AND NOT EXISTS (SELECT FROM pg_index i WHERE i.indrelid = l.oid AND i.indisprimary AND i.indimmediate))
                  AND EXISTS (SELECT FROM pg_publication p JOIN pg_publication_tables t USING (pubname)
                               WHERE p.pubupdate AND (t.schemaname, t.tablename) IN ((n.nspname, c.relname), (ln.nspname, l.relname)))) AS unidentified,
       c.reloftype <> 0 AS typed, ARRAY(SELECT conname::text FROM pg_constraint x WHERE x.conrelid = k.conrelid) AS constraint_names,
       ARRAY(SELECT format('%s.%I', a.attrelid::regclass, a.attname) FROM pg_attribute a JOIN pg_class h ON h.oid = a.attrelid AND h.relkind IN ('r', 'p', 'm')
              WHERE a.atttypid IN (c.reltype, (SELECT typarray FROM pg_type WHERE oid = c.reltype)) AND NOT a.attisdropped ORDER BY 1) AS held_in,
       ARRAY(SELECT t.tgname::text FROM pg_trigger t JOIN pg_proc p ON p.oid = t.tgfoid WHERE t.tgrelid = k.conrelid AND NOT t.tgisinternal AND t.tgenabled <> 'D'
                AND p.prosrc ~* '\minsert\M.*\m(old|new)\.\*' ORDER BY 1) AS whole_rows,
       ARRAY(SELECT p.oid::regprocedure::text FROM pg_proc p JOIN pg_language l ON l.oid = p.prolang WHERE p.prorettype = c.reltype AND l.lanname IN ('sql', 'plpgsql')
                AND (to_jsonb(p) ->> 'prosqlbody' IS NOT NULL OR p.prosrc ~* '\mselect\M' AND p.prosrc !~* '\mselect\s+("?\w+"?\.)?\*') ORDER BY 1) AS row_functions,
       obj_description(k.oid, 'pg_constraint') AS comment,
       (SELECT json_agg(json_build_array(ln.nspname, l.relname) ORDER BY l.oid) FROM pg_partition_tree(k.conrelid) t
          JOIN pg_class l ON l.oid = t.relid JOIN pg_namespace ln ON ln.oid = l.relnamespace WHERE t.isleaf AND c.relkind = 'p') AS leaves
  FROM pg_constraint k JOIN pg_class c ON c.oid = k.conrelid JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE k.confrelid = {oid} AND k.contype = 'f' AND k.conparentid = 0
 ORDER BY n.nspname, c.relname, k.conname

-- name: views
-- Views that read the table, with the text that re-points them once the names are swapped.
SELECT DISTINCT n.nspname AS schema, v.relname AS name, v.relkind = 'm' AS materialized,
       pg_get_userbyid(v.relowner) AS owner,
       'CREATE OR REPLACE VIEW ' || quote_ident(n.nspname) || '.' || quote_ident(v.relname)
       || coalesce(' WITH (' || array_to_string(v.reloptions, ', ') || ')', '') || ' AS ' || rtrim(pg_get_viewdef(v.oid), ';')
       || format('; ALTER VIEW %I.%I OWNER TO %I', n.nspname, v.relname, pg_get_userbyid(v.relowner)) AS definition
  FROM pg_depend d JOIN pg_rewrite r ON r.oid = d.objid AND d.classid = 'pg_rewrite'::regclass
  JOIN pg_class v ON v.oid = r.ev_class JOIN pg_namespace n ON n.oid = v.relnamespace
 WHERE d.refclassid = 'pg_class'::regclass AND d.refobjid = {oid} AND v.oid <> {oid} AND v.relkind IN ('v', 'm') AND r.rulename = '_RETURN'
 ORDER BY n.nspname, v.relname

-- name: carried
-- What a new table of the same name must be given, each as the statement that gives it, and how the retired one is
-- relieved of it (`retire`) and gets it back (`restore`); `leaf` is what each partition needs too, with chr(1) for its name.
-- Rendered by the server, with names quoted by the server. What lies on other tables takes their lock: `holder`.
WITH source AS (
  SELECT c.*, quote_ident(n.nspname) || '.' || quote_ident(c.relname) AS qualified, n.nspname AS schema_name
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = {oid}),
relation AS (  -- the table and its identity sequences: these are made anew, and with them their rights
  SELECT s.oid, s.qualified AS object, s.relacl, s.relowner, 'r'::"char" AS kind, NOT s.relrowsecurity AS leaves FROM source s
  UNION ALL
  SELECT q.oid, 'SEQUENCE ' || quote_ident(n.nspname) || '.' || quote_ident(q.relname), q.relacl, q.relowner, 'S', false
    FROM source s JOIN pg_depend d ON d.refobjid = s.oid AND d.refclassid = 'pg_class'::regclass AND d.deptype = 'i' AND d.classid = 'pg_class'::regclass
    JOIN pg_class q ON q.oid = d.objid AND q.relkind = 'S' JOIN pg_namespace n ON n.oid = q.relnamespace),
taking AS (  -- functions that take or return its rows, on which nothing rests: a type cannot be replaced in one, so it is made anew
  SELECT DISTINCT p.oid, p.oid::regprocedure::text AS signature, p.proowner, coalesce(p.proacl, acldefault('f', p.proowner)) AS acl
    FROM source s JOIN pg_type y ON y.oid = s.reltype
    JOIN pg_depend d ON d.refclassid = 'pg_type'::regclass AND d.refobjid IN (y.oid, y.typarray) AND d.deptype = 'n'
    JOIN pg_proc p ON d.classid = 'pg_proc'::regclass AND p.oid = d.objid
    JOIN pg_roles me ON me.rolname = current_user
   WHERE p.prokind <> 'a'  -- and only what we can make anew and give to its owner
     AND (me.rolsuper OR NOT p.proleakproof AND pg_has_role(p.proowner, 'USAGE') AND has_schema_privilege(p.pronamespace, 'CREATE')
          AND has_schema_privilege(p.proowner, p.pronamespace, 'CREATE'))
     AND NOT EXISTS (SELECT FROM pg_depend o WHERE o.refclassid = 'pg_proc'::regclass AND o.refobjid = p.oid
                     OR o.classid = 'pg_proc'::regclass AND o.objid = p.oid AND o.deptype IN ('e', 'x'))),
reading AS (  -- policies, rules and functions elsewhere, whose text names the table
  SELECT DISTINCT d.classid, d.objid FROM pg_depend d
   WHERE d.refclassid = 'pg_class'::regclass AND d.refobjid = {oid} AND d.deptype = 'n')
SELECT 'trigger' AS kind, t.tgname::text AS name,
       pg_get_triggerdef(t.oid) || CASE t.tgenabled WHEN 'O' THEN '' ELSE
         format('; ALTER TABLE %s %s TRIGGER %I', s.qualified,
                CASE t.tgenabled WHEN 'D' THEN 'DISABLE' WHEN 'R' THEN 'ENABLE REPLICA' ELSE 'ENABLE ALWAYS' END, t.tgname) END
       || coalesce(format('; COMMENT ON TRIGGER %I ON %s IS %L', t.tgname, s.qualified, obj_description(t.oid, 'pg_trigger')), '') AS definition,
       format('ALTER TABLE %s DISABLE TRIGGER %I', s.qualified, t.tgname) AS retire,
       format('ALTER TABLE %s %s TRIGGER %I', s.qualified,
              CASE t.tgenabled WHEN 'O' THEN 'ENABLE' WHEN 'D' THEN 'DISABLE' WHEN 'R' THEN 'ENABLE REPLICA' ELSE 'ENABLE ALWAYS' END, t.tgname) AS restore,
       CASE WHEN t.tgenabled <> 'O' AND t.tgtype & 1 = 1 AND current_setting('server_version_num')::integer < 160000  -- later it reaches them
            THEN format('ALTER TABLE %s %s TRIGGER %I', chr(1),
              CASE t.tgenabled WHEN 'D' THEN 'DISABLE' WHEN 'R' THEN 'ENABLE REPLICA' ELSE 'ENABLE ALWAYS' END, t.tgname) END AS leaf, NULL::text[] AS holder
  FROM pg_trigger t, source s WHERE t.tgrelid = s.oid AND NOT t.tgisinternal AND t.tgname NOT LIKE 'runbook\_%'
UNION ALL
SELECT 'policy', p.polname::text,
       format('CREATE POLICY %I ON %s AS %s FOR %s TO %s%s%s', p.polname, s.qualified,
              CASE WHEN p.polpermissive THEN 'PERMISSIVE' ELSE 'RESTRICTIVE' END,
              CASE p.polcmd WHEN 'r' THEN 'SELECT' WHEN 'a' THEN 'INSERT' WHEN 'w' THEN 'UPDATE' WHEN 'd' THEN 'DELETE' ELSE 'ALL' END,
              (SELECT string_agg(CASE r WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(r)) END, ', ') FROM unnest(p.polroles) r),
              coalesce(' USING (' || pg_get_expr(p.polqual, p.polrelid) || ')', ''),
              coalesce(' WITH CHECK (' || pg_get_expr(p.polwithcheck, p.polrelid) || ')', ''))
       || coalesce(format('; COMMENT ON POLICY %I ON %s IS %L', p.polname, s.qualified, obj_description(p.oid, 'pg_policy')), ''), NULL, NULL, NULL, NULL
  FROM pg_policy p, source s WHERE p.polrelid = s.oid
UNION ALL
SELECT 'row security', 'enabled', format('ALTER TABLE %s ENABLE ROW LEVEL SECURITY', qualified), NULL, NULL, NULL, NULL FROM source WHERE relrowsecurity
UNION ALL
SELECT 'row security', 'forced', format('ALTER TABLE %s FORCE ROW LEVEL SECURITY', qualified), NULL, NULL, NULL, NULL FROM source WHERE relforcerowsecurity
UNION ALL
-- A grant on a partition bypasses the root's policies: with row-level security partitions get none.
-- What another than the owner granted must be granted by that one again, after that one was granted the right to.
SELECT CASE WHEN a.grantor = r.relowner THEN 'grant' ELSE 'grant of another' END, w.grantee || ' ' || w.privileges || w.of || w.place,
       w.first || format('GRANT %s ON %s TO %s%s', w.privileges, r.object, w.who, w.option) || w.last, NULL, NULL,
       CASE WHEN r.leaves THEN w.first || format('GRANT %s ON %s TO %s%s', w.privileges, chr(1), w.who, w.option) || w.last END, NULL
  FROM relation r
 CROSS JOIN LATERAL (SELECT a.grantor, a.grantee, a.is_grantable, string_agg(a.privilege_type, ', ' ORDER BY a.privilege_type) AS privileges
                       FROM aclexplode(r.relacl) a WHERE a.grantee <> r.relowner GROUP BY 1, 2, 3) a
 CROSS JOIN LATERAL (SELECT CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(a.grantee)) END AS who, a.privileges,
                            CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE pg_get_userbyid(a.grantee) END AS grantee,
                            CASE WHEN a.is_grantable THEN ' WITH GRANT OPTION' ELSE '' END AS option,
                            CASE r.kind WHEN 'S' THEN ' on ' || r.object ELSE '' END AS place,
                            CASE WHEN a.grantor = r.relowner THEN '' ELSE ' by ' || pg_get_userbyid(a.grantor) END AS of,
                            CASE WHEN a.grantor = r.relowner THEN '' ELSE format('SET LOCAL ROLE %I; ', pg_get_userbyid(a.grantor)) END AS first,
                            CASE WHEN a.grantor = r.relowner THEN '' ELSE '; RESET ROLE' END AS last) w
UNION ALL
SELECT 'grant', 'owner on ' || r.object,
       format('REVOKE ALL ON %s FROM %I', r.object, pg_get_userbyid(r.relowner))
       || coalesce(format('; GRANT %s ON %s TO %I', string_agg(a.privilege_type, ', ' ORDER BY a.privilege_type), r.object, pg_get_userbyid(r.relowner)), ''),
       -- As the retired table it is to take what is written meanwhile: until the way back the owner has what was taken from it.
       CASE r.kind WHEN 'r' THEN format('GRANT %s ON %s TO %I', m.missing, r.object, pg_get_userbyid(r.relowner)) END,
       CASE r.kind WHEN 'r' THEN format('REVOKE %s ON %s FROM %I', m.missing, r.object, pg_get_userbyid(r.relowner)) END, NULL, NULL
  FROM relation r LEFT JOIN LATERAL aclexplode(r.relacl) a ON a.grantee = r.relowner
 CROSS JOIN LATERAL (SELECT string_agg(d.privilege_type, ', ' ORDER BY d.privilege_type) FROM aclexplode(acldefault(r.kind, r.relowner)) d
                      WHERE d.grantee = r.relowner AND NOT EXISTS (SELECT FROM aclexplode(r.relacl) o WHERE (o.grantee, o.privilege_type) = (d.grantee, d.privilege_type))) m(missing)
 WHERE r.relacl IS NOT NULL AND m.missing IS NOT NULL GROUP BY r.object, r.relowner, r.kind, m.missing
UNION ALL
SELECT CASE WHEN x.grantor = s.relowner THEN 'grant' ELSE 'grant of another' END, 'columns of ' || w.grantee || ' ' || x.privilege_type || w.of,
       w.first || format('GRANT %s (%s) ON %s TO %s%s', x.privilege_type, x.columns, s.qualified, w.who, w.option) || w.last, NULL, NULL,
       CASE WHEN NOT s.relrowsecurity THEN w.first || format('GRANT %s (%s) ON %s TO %s%s', x.privilege_type, x.columns, chr(1), w.who, w.option) || w.last END, NULL
  FROM source s CROSS JOIN LATERAL (
       SELECT x.grantor, x.grantee, x.privilege_type, x.is_grantable, string_agg(quote_ident(a.attname), ', ' ORDER BY a.attnum) AS columns
         FROM pg_attribute a CROSS JOIN LATERAL aclexplode(a.attacl) x
        WHERE a.attrelid = s.oid AND NOT a.attisdropped AND x.grantee <> s.relowner GROUP BY 1, 2, 3, 4) x
 CROSS JOIN LATERAL (SELECT CASE x.grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(x.grantee)) END AS who,
                            CASE x.grantee WHEN 0 THEN 'PUBLIC' ELSE pg_get_userbyid(x.grantee) END AS grantee,
                            CASE WHEN x.is_grantable THEN ' WITH GRANT OPTION' ELSE '' END AS option,
                            CASE WHEN x.grantor = s.relowner THEN '' ELSE ' by ' || pg_get_userbyid(x.grantor) END AS of,
                            CASE WHEN x.grantor = s.relowner THEN '' ELSE format('SET LOCAL ROLE %I; ', pg_get_userbyid(x.grantor)) END AS first,
                            CASE WHEN x.grantor = s.relowner THEN '' ELSE '; RESET ROLE' END AS last) w
UNION ALL
SELECT 'comment', r.object, format('COMMENT ON %s IS %L', r.object, obj_description(r.oid, 'pg_class')), NULL, NULL, NULL, NULL
  FROM relation r WHERE r.kind = 'S' AND obj_description(r.oid, 'pg_class') IS NOT NULL
UNION ALL
SELECT 'sequence', q.oid::regclass::text,
       format('ALTER SEQUENCE %s OWNED BY %s.%I', q.oid::regclass, s.qualified, a.attname), NULL,
       format('ALTER SEQUENCE %s OWNED BY %s.%I', q.oid::regclass, s.qualified, a.attname), NULL, NULL
  FROM source s JOIN pg_depend d ON d.refobjid = s.oid AND d.refclassid = 'pg_class'::regclass AND d.deptype = 'a' AND d.classid = 'pg_class'::regclass
  JOIN pg_class q ON q.oid = d.objid AND q.relkind = 'S' JOIN pg_attribute a ON a.attrelid = s.oid AND a.attnum = d.refobjsubid
UNION ALL
SELECT 'security label', l.provider || ' ' || coalesce(a.attname::text, ''),
       format('SECURITY LABEL FOR %I ON %s IS %L', l.provider, coalesce(format('COLUMN %s.%I', s.qualified, a.attname), 'TABLE ' || s.qualified), l.label), NULL, NULL, NULL, NULL
  FROM pg_seclabel l JOIN source s ON l.classoid = 'pg_class'::regclass AND l.objoid = s.oid
  LEFT JOIN pg_attribute a ON a.attrelid = s.oid AND a.attnum = l.objsubid AND l.objsubid > 0
UNION ALL
SELECT 'publication', p.pubname::text, a.added, format('ALTER PUBLICATION %I DROP TABLE %s', p.pubname, s.qualified), a.added, NULL, NULL
  FROM pg_publication_rel r JOIN pg_publication p ON p.oid = r.prpubid JOIN source s ON r.prrelid = s.oid
 CROSS JOIN LATERAL (  -- columns and rows: 15 on
       SELECT format('ALTER PUBLICATION %I ADD TABLE ONLY %s', p.pubname, s.qualified)
              || coalesce((SELECT ' (' || string_agg(quote_ident(a.attname), ', ' ORDER BY a.attnum) || ')' FROM pg_attribute a
                            WHERE a.attrelid = s.oid AND to_jsonb(r) -> 'prattrs' <> 'null' AND a.attname = ANY (f.columns)), '')
              || coalesce(' WHERE (' || f.filter || ')', '')
         FROM (SELECT (SELECT array_agg(c.name) FROM jsonb_array_elements_text(coalesce(to_jsonb(t) -> 'attnames', '[]')) c(name)) AS columns, to_jsonb(t) ->> 'rowfilter' AS filter
                 FROM (SELECT 1) one  -- of a partitioned table the view has the partitions, maybe
                 LEFT JOIN pg_publication_tables t ON t.pubname = p.pubname AND t.schemaname = s.schema_name AND t.tablename = s.relname) f) a(added)
UNION ALL
SELECT 'statistics', x.stxname::text,
       pg_get_statisticsobjdef(x.oid) || format('; ALTER STATISTICS %s OWNER TO %I', o.qualified, pg_get_userbyid(x.stxowner))
       || coalesce('; ALTER STATISTICS ' || o.qualified || ' SET STATISTICS ' || nullif(to_jsonb(x) ->> 'stxstattarget', '-1'), '')
       || format('; COMMENT ON STATISTICS %s IS %L', o.qualified, obj_description(x.oid, 'pg_statistic_ext')),
       format('ALTER STATISTICS %s RENAME TO %I', o.qualified, o.retired),
       format('DROP STATISTICS %s; ALTER STATISTICS %I.%I RENAME TO %I', o.qualified, n.nspname, o.retired, x.stxname),
       format('CREATE STATISTICS IF NOT EXISTS %s%s%s', chr(2), substr(o.of_it, 1 + length('CREATE STATISTICS ' || o.qualified), length(o.of_it) - length('CREATE STATISTICS ' || o.qualified || s.qualified)), chr(1))
       || coalesce('; ALTER STATISTICS ' || chr(2) || ' SET STATISTICS ' || nullif(to_jsonb(x) ->> 'stxstattarget', '-1'), '')
       || format('; ALTER STATISTICS %s OWNER TO %I', chr(2), pg_get_userbyid(x.stxowner)), NULL
  FROM source s JOIN pg_statistic_ext x ON x.stxrelid = s.oid JOIN pg_namespace n ON n.oid = x.stxnamespace
 CROSS JOIN LATERAL (SELECT quote_ident(n.nspname) || '.' || quote_ident(x.stxname) AS qualified, 'retired_' || md5(x.stxname) AS retired,
                            pg_get_statisticsobjdef(x.oid) AS of_it) o
UNION ALL
SELECT 'rule', r.rulename::text, pg_get_ruledef(r.oid)
       || CASE r.ev_enabled WHEN 'O' THEN '' ELSE format('; ALTER TABLE %s %s RULE %I', s.qualified, w.state, r.rulename) END
       || format('; COMMENT ON RULE %I ON %s IS %L', r.rulename, s.qualified, obj_description(r.oid, 'pg_rewrite')),
       format('ALTER TABLE %s DISABLE RULE %I', s.qualified, r.rulename), format('ALTER TABLE %s %s RULE %I', s.qualified, w.state, r.rulename), NULL, NULL
  FROM source s JOIN pg_rewrite r ON r.ev_class = s.oid
 CROSS JOIN LATERAL (SELECT CASE r.ev_enabled WHEN 'O' THEN 'ENABLE' WHEN 'D' THEN 'DISABLE' WHEN 'R' THEN 'ENABLE REPLICA' ELSE 'ENABLE ALWAYS' END) w(state)
UNION ALL
SELECT 'policy elsewhere', format('%s on %s', p.polname, p.polrelid::regclass),
       format('ALTER POLICY %I ON %s%s%s', p.polname, p.polrelid::regclass, ' USING (' || pg_get_expr(p.polqual, p.polrelid) || ')',
              ' WITH CHECK (' || pg_get_expr(p.polwithcheck, p.polrelid) || ')'), NULL,
       format('ALTER POLICY %I ON %s%s%s', p.polname, p.polrelid::regclass, ' USING (' || pg_get_expr(p.polqual, p.polrelid) || ')',
              ' WITH CHECK (' || pg_get_expr(p.polwithcheck, p.polrelid) || ')'), NULL,
       (SELECT ARRAY[(SELECT nspname FROM pg_namespace WHERE oid = c.relnamespace), c.relname]::text[] FROM pg_class c WHERE c.oid = p.polrelid)
  FROM reading d JOIN pg_policy p ON d.classid = 'pg_policy'::regclass AND p.oid = d.objid AND p.polrelid <> {oid}
UNION ALL
SELECT 'rule elsewhere', format('%s on %s', r.rulename, r.ev_class::regclass), regexp_replace(pg_get_ruledef(r.oid), '^CREATE RULE', 'CREATE OR REPLACE RULE'), NULL,
       regexp_replace(pg_get_ruledef(r.oid), '^CREATE RULE', 'CREATE OR REPLACE RULE'), NULL,
       (SELECT ARRAY[(SELECT nspname FROM pg_namespace WHERE oid = c.relnamespace), c.relname]::text[] FROM pg_class c WHERE c.oid = r.ev_class AND c.relkind <> 'v')
  FROM reading d JOIN pg_rewrite r ON d.classid = 'pg_rewrite'::regclass AND r.oid = d.objid AND r.ev_class <> {oid} AND r.rulename <> '_RETURN'
UNION ALL
SELECT 'function', p.oid::regprocedure::text, pg_get_functiondef(p.oid), NULL, pg_get_functiondef(p.oid), NULL, NULL
  FROM reading d JOIN pg_proc p ON d.classid = 'pg_proc'::regclass AND p.oid = d.objid
UNION ALL
SELECT 'function of its rows', f.signature, w.definition, 'DROP ROUTINE IF EXISTS ' || f.signature, w.definition, NULL, NULL
  FROM taking f
 CROSS JOIN LATERAL (SELECT pg_get_functiondef(f.oid) || format('; ALTER ROUTINE %s OWNER TO %I; REVOKE ALL ON ROUTINE %1$s FROM PUBLIC', f.signature, pg_get_userbyid(f.proowner))
       || coalesce((SELECT string_agg(DISTINCT ', ' || quote_ident(pg_get_userbyid(a.grantee)), '') FROM pg_default_acl x CROSS JOIN LATERAL aclexplode(x.defaclacl) a
                     WHERE x.defaclobjtype = 'f' AND a.grantee NOT IN (0, f.proowner)), '')
       || coalesce((SELECT string_agg(format('; GRANT EXECUTE ON ROUTINE %s TO %s%s', f.signature, CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(a.grantee)) END,
                                             CASE WHEN a.is_grantable THEN ' WITH GRANT OPTION' END), '' ORDER BY a.grantee)
                      FROM aclexplode(f.acl) a WHERE a.grantee <> f.proowner), '')
       || coalesce('; COMMENT ON ROUTINE ' || f.signature || ' IS ' || quote_literal(obj_description(f.oid, 'pg_proc')), '') AS definition) w
ORDER BY 1, 2

-- name: self_writers
-- Triggers that fire after a row, and by their functions' text change rows of the same table.
SELECT t.tgname AS name FROM pg_trigger t JOIN pg_proc p ON p.oid = t.tgfoid JOIN pg_class c ON c.oid = t.tgrelid
 WHERE t.tgrelid = {oid} AND NOT t.tgisinternal AND t.tgenabled <> 'D' AND t.tgtype & 3 = 1
   AND regexp_replace(p.prosrc, '--[^\n]*|/\*.*?\*/', ' ', 'g') ~* format('\m(UPDATE|DELETE\s+FROM|MERGE\s+INTO)\s+(ONLY\s+)?("?\w+"?\s*\.\s*)?"?%s"?($|[^\w"])',
       regexp_replace(c.relname, '([^[:alnum:]_])', '\\\1', 'g'))
 ORDER BY 1

-- name: event_triggers
SELECT e.evtname AS name, e.evtfoid::regprocedure::text AS function FROM pg_event_trigger e
 WHERE e.evtenabled <> 'D' AND e.evtevent IN ('ddl_command_start', 'ddl_command_end', 'sql_drop') ORDER BY 1

-- name: try_table
CREATE TABLE runbook.tried_by_00 ()

-- name: tried_owner
SELECT pg_get_userbyid(relowner) FROM pg_class WHERE oid = 'runbook.tried_by_00'::regclass AND pg_get_userbyid(relowner) <> current_user

-- name: pruning
SHOW enable_partition_pruning

-- name: lock_table
SELECT current_setting('max_locks_per_transaction')::int * (current_setting('max_connections')::int + current_setting('max_prepared_transactions')::int) AS places,
       current_setting('max_connections')::int AS connections

-- name: others
-- Everything else that depends on the table, its row type or its primary key: what nobody carries must stop the plan.
-- By the table itself come its own parts, views, rules, policies and SQL-body functions, which are carried; by its row
-- type or its key nothing is.
SELECT pg_describe_object(d.classid, d.objid, d.objsubid) AS object
  FROM pg_depend d
 WHERE d.deptype IN ('n', 'a')
   AND (d.refclassid = 'pg_class'::regclass AND d.refobjid = {oid}
        AND d.classid NOT IN ('pg_attrdef'::regclass, 'pg_trigger'::regclass, 'pg_policy'::regclass, 'pg_statistic_ext'::regclass,
                              'pg_publication_rel'::regclass, 'pg_rewrite'::regclass, 'pg_proc'::regclass)
        AND NOT (d.classid = 'pg_class'::regclass AND (d.objid = {oid}  -- a generated column, on 14
                 OR d.objid IN (SELECT indexrelid FROM pg_index WHERE indrelid = {oid})
                 OR d.objid IN (SELECT inhrelid FROM pg_inherits WHERE inhparent = {oid})  -- which is said, and must not be dropped
                 OR (SELECT relkind FROM pg_class WHERE oid = d.objid) IN ('S', 't')))
        -- defaults, triggers and checks of other tables that name it; whatever takes numbers from its identity sequences
        OR d.refclassid = 'pg_class'::regclass AND d.refobjid = {oid}
           AND (d.classid = 'pg_attrdef'::regclass AND (SELECT adrelid FROM pg_attrdef WHERE oid = d.objid) <> {oid}
                OR d.classid = 'pg_trigger'::regclass AND (SELECT tgrelid <> {oid} AND NOT tgisinternal FROM pg_trigger WHERE oid = d.objid)
                OR d.classid = 'pg_constraint'::regclass AND (SELECT contype = 'c' AND conrelid <> {oid} FROM pg_constraint WHERE oid = d.objid))
        OR d.refclassid = 'pg_class'::regclass AND d.deptype = 'n' AND d.refobjid IN (
           SELECT i.objid FROM pg_depend i WHERE (i.classid, i.refclassid, i.refobjid, i.deptype) = ('pg_class'::regclass, 'pg_class'::regclass, {oid}, 'i'))
        OR d.refclassid = 'pg_type'::regclass AND d.refobjid IN (SELECT t FROM pg_class c, pg_type y,
             LATERAL (VALUES (y.oid), (y.typarray)) v(t) WHERE c.oid = {oid} AND y.oid = c.reltype)
        OR d.refclassid = 'pg_constraint'::regclass AND d.refobjid IN (SELECT oid FROM pg_constraint WHERE conrelid = {oid})
        AND d.classid NOT IN ('pg_constraint'::regclass, 'pg_rewrite'::regclass))
   AND NOT (d.classid = 'pg_constraint'::regclass AND d.refclassid = 'pg_class'::regclass
            AND (SELECT contype <> 'c' OR conrelid = {oid} FROM pg_constraint WHERE oid = d.objid))
   AND NOT (d.classid = 'pg_rewrite'::regclass AND (SELECT ev_class FROM pg_rewrite WHERE oid = d.objid) = {oid})
 GROUP BY 1 ORDER BY 1

-- name: obstacles
-- What a partitioned table cannot have, or cannot be given without harm, each with its sentence and the way out.
WITH source AS (SELECT c.*, n.nspname AS schema_name, n.nspname || '.' || c.relname AS full_name, r.rolsuper OR r.rolbypassrls AS bypasses
                  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace, pg_roles r WHERE c.oid = {oid} AND r.rolname = current_user),
publication AS (
  SELECT p.pubname, p.puballtables, p.pubviaroot, t.tablename IS NOT NULL AS publishes, r.oid IS NOT NULL AS by_name,
         to_jsonb(t) -> 'attnames' AS columns, to_jsonb(r) -> 'prattrs' <> 'null' AS listed
    FROM source s CROSS JOIN pg_publication p LEFT JOIN pg_publication_rel r ON r.prpubid = p.oid AND r.prrelid = s.oid
    LEFT JOIN pg_publication_tables t ON (t.pubname, t.schemaname, t.tablename) = (p.pubname, s.schema_name, s.relname))
SELECT 'blocker' AS level, x.relname::text AS object, format('The index %s is not valid: CREATE INDEX CONCURRENTLY failed.', x.relname) AS sentence,
       format('REINDEX INDEX CONCURRENTLY %I; or drop it.', x.relname) AS way_out
  FROM pg_index i JOIN pg_class x ON x.oid = i.indexrelid WHERE i.indrelid = {oid} AND NOT i.indisvalid
UNION ALL
SELECT 'blocker', k.conname, format('%s is NOT VALID, which a partition cannot be given so that it stays like that.', k.conname),
       format('ALTER TABLE %s VALIDATE CONSTRAINT %I; first.', k.conrelid::regclass, k.conname)
  FROM pg_constraint k WHERE k.conrelid = {oid} AND NOT k.convalidated AND k.conparentid = 0  -- before 18 a key to a partitioned table has children
   AND (k.contype = 'n' OR k.contype = 'f' AND current_setting('server_version_num')::int < 180000)
UNION ALL
SELECT 'blocker', k.conname, format('%s keeps NULL out of %s alone (NO INHERIT): its partitions would take it.', k.conname, k.conrelid::regclass),
       format('ALTER TABLE %s ALTER CONSTRAINT %I INHERIT; first.', k.conrelid::regclass, k.conname)
  FROM pg_constraint k WHERE k.conrelid = {oid} AND k.contype = 'n' AND k.connoinherit
UNION ALL
SELECT 'blocker', x.relname, format('The index %s reads the row as a whole, which no index of a partitioned table can.', x.relname), 'Make it anew with the columns named one by one, first; or drop it.'
  FROM pg_index i JOIN pg_class x ON x.oid = i.indexrelid WHERE i.indrelid = {oid} AND concat(i.indexprs, i.indpred) LIKE '%:varattno 0 %'
UNION ALL
SELECT 'blocker', k.conname, format('%s of %s is NOT ENFORCED, and its composite successor would be.', k.conname, k.conrelid::regclass), 'Drop it first: it keeps nothing.'
  FROM pg_constraint k WHERE k.confrelid = {oid} AND pg_get_constraintdef(k.oid) LIKE '% NOT ENFORCED'
   AND (k.conrelid <> {oid} OR (SELECT attnum FROM pg_attribute WHERE attrelid = {oid} AND attname = {key}) <> ALL (k.confkey))  -- else it stays what it is
UNION ALL
SELECT 'blocker', k.conname, format('%s is a key over time (WITHOUT OVERLAPS or PERIOD), which is not carried over.', k.conname), 'Drop it first.'
  FROM pg_constraint k WHERE {oid} IN (k.conrelid, k.confrelid) AND pg_get_constraintdef(k.oid) ~ 'WITHOUT OVERLAPS|[(, ]PERIOD "?\w'
UNION ALL
SELECT 'blocker', t.tgname::text, format('%s has the trigger %s, whose name 02 needs: it is somebody else''s, or left of a migration whose ledger is gone.', t.tgrelid::regclass, t.tgname),
       format('DROP TRIGGER %I ON %s; or rename it.', t.tgname, t.tgrelid::regclass)
  FROM pg_trigger t WHERE t.tgrelid = {oid} AND t.tgname LIKE 'runbook\_log\_%'
UNION ALL
SELECT 'blocker', s.full_name, format('%s is made of the type %s, which its partitions could not be.', s.full_name, s.reloftype::regtype), 'ALTER TABLE ... NOT OF; first.'
  FROM source s WHERE s.reloftype <> 0
UNION ALL
SELECT 'blocker', s.full_name, format('%s is stored by the access method %s.', s.full_name, a.amname), 'ALTER TABLE ... SET ACCESS METHOD heap; first.'
  FROM source s JOIN pg_am a ON a.oid = s.relam WHERE a.amname <> 'heap'
UNION ALL
SELECT 'blocker', s.full_name, format('%s belongs to the extension %s.', s.full_name, e.extname), format('ALTER EXTENSION %I DROP TABLE ...; first.', e.extname)
  FROM source s JOIN pg_depend d ON d.classid = 'pg_class'::regclass AND d.objid = s.oid AND d.deptype = 'e' JOIN pg_extension e ON e.oid = d.refobjid
UNION ALL
SELECT 'blocker', s.full_name, format('Row-level security is forced on %s, so that %s may not copy it.', s.full_name, current_user), format('ALTER ROLE %I BYPASSRLS;', current_user)
  FROM source s WHERE s.relforcerowsecurity AND s.relrowsecurity AND NOT s.bypasses
UNION ALL
SELECT DISTINCT 'blocker', v.oid::regclass::text, format('%s does not own the view %s, which reads %s.', current_user, v.oid::regclass, s.full_name),
       (SELECT CASE WHEN rolsuper THEN format('Let %I, or another role that is no superuser, own it; or work as %I.', current_user, rolname)
                    ELSE format('GRANT %I TO %I;', rolname, current_user) END FROM pg_roles WHERE oid = v.relowner)
  FROM source s JOIN pg_depend d ON d.refclassid = 'pg_class'::regclass AND d.refobjid = s.oid AND d.classid = 'pg_rewrite'::regclass
  JOIN pg_rewrite r ON r.oid = d.objid JOIN pg_class v ON v.oid = r.ev_class AND v.relkind = 'v' WHERE NOT pg_has_role(v.relowner, 'USAGE')
UNION ALL
-- What the cut-over makes anew belongs to somebody, too.
SELECT DISTINCT 'blocker', o.what, format('%s does not own the %s, which the cut-over has to make anew.', current_user, o.what),
       (SELECT CASE WHEN rolsuper THEN format('Let %I, or another role that is no superuser, own it; or work as %I.', current_user, rolname)
                    ELSE format('GRANT %I TO %I;', rolname, current_user) END FROM pg_roles WHERE oid = o.owner)
  FROM (SELECT 'statistics ' || x.stxname AS what, x.stxowner AS owner FROM pg_statistic_ext x WHERE x.stxrelid = {oid}
        UNION ALL SELECT 'publication ' || p.pubname, p.pubowner FROM pg_publication_rel r JOIN pg_publication p ON p.oid = r.prpubid WHERE r.prrelid = {oid}
        UNION ALL SELECT 'function ' || p.oid::regprocedure, p.proowner FROM pg_depend d JOIN pg_proc p ON d.classid = 'pg_proc'::regclass AND p.oid = d.objid
                   WHERE d.refclassid = 'pg_class'::regclass AND d.refobjid = {oid} AND d.deptype = 'n'
        UNION ALL SELECT format('table %s, whose policy %s reads it', p.polrelid::regclass, p.polname), c.relowner FROM pg_depend d JOIN pg_policy p ON d.classid = 'pg_policy'::regclass AND p.oid = d.objid
                    JOIN pg_class c ON c.oid = p.polrelid WHERE d.refclassid = 'pg_class'::regclass AND d.refobjid = {oid} AND d.deptype = 'n' AND p.polrelid <> {oid}
        UNION ALL SELECT format('table %s, whose rule %s names it', r.ev_class::regclass, r.rulename), c.relowner FROM pg_depend d JOIN pg_rewrite r ON d.classid = 'pg_rewrite'::regclass AND r.oid = d.objid
                    JOIN pg_class c ON c.oid = r.ev_class WHERE d.refclassid = 'pg_class'::regclass AND d.refobjid = {oid} AND d.deptype = 'n' AND r.ev_class <> {oid} AND r.rulename <> '_RETURN') o
 WHERE NOT pg_has_role(o.owner, 'USAGE')
UNION ALL
SELECT DISTINCT 'blocker', t.tgname::text, format('%s may not execute %s, which the trigger %s calls: it could not be made anew.', current_user, t.tgfoid::regprocedure, t.tgname),
       format('GRANT EXECUTE ON FUNCTION %s TO %I;', t.tgfoid::regprocedure, current_user)
  FROM pg_trigger t WHERE t.tgrelid = {oid} AND NOT t.tgisinternal AND NOT has_function_privilege(t.tgfoid, 'EXECUTE')
UNION ALL
SELECT DISTINCT 'blocker', k.confrelid::regclass::text, format('%s may not lock %s, which %s references, and make that foreign key anew.', current_user, k.confrelid::regclass, k.conname),
       format('GRANT REFERENCES, UPDATE ON %s TO %I;', k.confrelid::regclass, current_user)
  FROM pg_constraint k WHERE k.conrelid = {oid} AND k.contype = 'f' AND k.confrelid <> {oid}
   AND NOT (has_table_privilege(k.confrelid, 'REFERENCES') AND has_table_privilege(k.confrelid, 'UPDATE, DELETE, TRUNCATE'))
UNION ALL
SELECT DISTINCT 'blocker', c.oid::regclass::text, format('Row-level security is forced on %s, so that %s may not fill its new column.', c.oid::regclass, current_user), format('ALTER ROLE %I BYPASSRLS;', current_user)
  FROM source s JOIN pg_constraint k ON k.confrelid = s.oid AND k.contype = 'f' AND k.conrelid <> s.oid JOIN pg_class c ON c.oid = k.conrelid
 WHERE c.relrowsecurity AND c.relforcerowsecurity AND NOT s.bypasses
UNION ALL
SELECT DISTINCT 'blocker', t.tgname::text, format('The trigger %s sets %s BEFORE the row is written, when its partition is chosen already: PostgreSQL would refuse the row.', t.tgname, {key}),
       format('Let the application, or a default of %s, give the value, and leave it out of %s.', {key}, t.tgfoid::regprocedure)
  FROM pg_trigger t JOIN pg_proc p ON p.oid = t.tgfoid
 WHERE t.tgrelid = {oid} AND NOT t.tgisinternal AND t.tgtype & 7 = 7  -- an update's BEFORE triggers may move the row
  
   -- Without comments. With = it is an assignment where a statement begins.
   AND regexp_replace(p.prosrc, '--[^\n]*|/\*.*?\*/', ' ', 'g') ~* format(
       '\m(NEW\s*\.\s*"?%1$s"?\s*:=|INTO\s+NEW\s*\.\s*"?%1$s\M)|(;|\m(BEGIN|THEN|ELSE|LOOP)\M)\s*NEW\s*\.\s*"?%1$s"?\s*=',
       regexp_replace({key}, '([^[:alnum:]_])', '\\\1', 'g'))
UNION ALL
SELECT DISTINCT 'warning', t.tgname::text, format('%s, which the trigger %s calls BEFORE the row is written, makes the whole row anew: were that to give it another %s, or one where it has none, PostgreSQL would refuse the row.', t.tgfoid::regprocedure, t.tgname, {key}),
       format('Look into it, and let the application, or a default of %s, give the value.', {key})
  FROM pg_trigger t JOIN pg_proc p ON p.oid = t.tgfoid
 WHERE t.tgrelid = {oid} AND NOT t.tgisinternal AND t.tgtype & 7 = 7
   AND regexp_replace(p.prosrc, '--[^\n]*|/\*.*?\*/', ' ', 'g') ~* '\mNEW\s*:=|\mINTO\s+NEW\s*($|[^.\s])|(;|\m(BEGIN|THEN|ELSE|LOOP)\M)\s*NEW\s*='
UNION ALL
SELECT DISTINCT 'blocker', c.oid::regclass::text, format('%s, which references it, is fed by the subscription %s, whose changes no trigger sees.', c.oid::regclass, u.subname),
       'Migrate the publisher''s tables, or make the subscription anew after it.'
  FROM pg_constraint k JOIN pg_class c ON c.oid = k.conrelid JOIN pg_subscription_rel r ON r.srrelid = c.oid JOIN pg_subscription u ON u.oid = r.srsubid
 WHERE k.confrelid = {oid} AND k.contype = 'f' AND c.oid <> {oid}
UNION ALL
-- A trigger on a row is a trigger of the row's partition.
SELECT DISTINCT 'warning', t.tgname::text, format('%s, which the trigger %s calls, asks for the name of the table (TG_TABLE_NAME, TG_RELID): for each row that will be the partition''s.', t.tgfoid::regprocedure, t.tgname),
       'Give it the name as an argument of the trigger, or ask coalesce(pg_partition_root(TG_RELID), TG_RELID), which is right before and after.'
  FROM pg_trigger t JOIN pg_proc p ON p.oid = t.tgfoid
 WHERE t.tgrelid = {oid} AND NOT t.tgisinternal AND t.tgtype & 1 = 1 AND regexp_replace(p.prosrc, 'coalesce\s*\(\s*pg_partition_root\s*\(\s*TG_RELID\s*\)\s*,\s*TG_RELID\s*\)', '', 'gi') ~* '\mTG_(TABLE_NAME|RELNAME|RELID)\M'
UNION ALL
SELECT DISTINCT 'blocker', v.oid::regclass::text,
       CASE WHEN v.relkind IN ('v', 'm') THEN format('The view %s groups by the primary key alone, which will no longer be one.', v.oid::regclass)
            ELSE format('The rule %s of %s names the constraint %s, which will be another one.', r.rulename, v.oid::regclass, k.conname) END,
       CASE WHEN v.relkind IN ('v', 'm') THEN 'Name every column that it selects in its GROUP BY first.' ELSE 'Drop that rule before, and make it anew after the cut-over.' END
  FROM pg_constraint k JOIN pg_depend d ON d.refclassid = 'pg_constraint'::regclass AND d.refobjid = k.oid AND d.classid = 'pg_rewrite'::regclass
  JOIN pg_rewrite r ON r.oid = d.objid JOIN pg_class v ON v.oid = r.ev_class WHERE k.conrelid = {oid}
UNION ALL
SELECT DISTINCT 'blocker', x.object, format('%s reads ONLY %s, and a partitioned table has no rows of its own.', x.object, s.full_name), 'Make it anew without ONLY first.'
  FROM source s JOIN pg_depend d ON d.refclassid = 'pg_class'::regclass AND d.refobjid = s.oid
 CROSS JOIN LATERAL (SELECT pg_describe_object(d.classid, d.objid, 0) AS object, CASE d.classid
          WHEN 'pg_rewrite'::regclass THEN pg_get_ruledef(d.objid) WHEN 'pg_proc'::regclass THEN pg_get_functiondef(d.objid)
          WHEN 'pg_policy'::regclass THEN (SELECT concat(pg_get_expr(polqual, polrelid), pg_get_expr(polwithcheck, polrelid)) FROM pg_policy WHERE oid = d.objid) END AS text) x
 WHERE strpos(x.text, format('ONLY %I.%I', s.schema_name, s.relname)) > 0
UNION ALL
SELECT DISTINCT 'blocker', v.oid::regclass::text, format('The temporary view %s of another session reads %s.', v.oid::regclass, s.full_name), 'End that session, or drop the view in it.'
  FROM source s JOIN pg_depend d ON d.refclassid = 'pg_class'::regclass AND d.refobjid = s.oid AND d.classid = 'pg_rewrite'::regclass
  JOIN pg_rewrite r ON r.oid = d.objid JOIN pg_class v ON v.oid = r.ev_class AND v.relpersistence = 't'
UNION ALL
SELECT 'blocker', p.pubname, format('The publication %s is FOR ALL TABLES and would publish the shadow.', p.pubname), 'Publish the tables by name or by schema.'
  FROM publication p WHERE p.puballtables
UNION ALL
SELECT 'blocker', p.pubname, format('The publication %s publishes partitions under their own names, which would stop its subscribers.', p.pubname),
       format('ALTER PUBLICATION %I SET (publish_via_partition_root = true);', p.pubname)
  FROM publication p WHERE p.publishes AND NOT p.puballtables AND NOT p.pubviaroot
UNION ALL
SELECT 'blocker', p.pubname, format('The publication %s leaves out %s, which becomes part of the primary key: updates and deletes would be refused.', p.pubname, {key}),
       format('Add %I to the columns that it publishes, and to the subscriber''s table.', {key}::text)
  FROM publication p, source s WHERE p.listed AND s.relreplident = 'd' AND NOT p.columns ? {key}
UNION ALL
SELECT 'blocker', p.pubname, format('The publication %s publishes whole schema %s, and with it the backup that 01 makes.', p.pubname, s.schema_name),
       'Set backup_method = "dump", or publish the tables by name.'
  FROM publication p, source s WHERE p.publishes AND NOT p.puballtables AND NOT p.by_name AND {backup} = 'table'
UNION ALL
SELECT 'warning', p.pubname, format('The publication %s publishes whole schema %s: on the way back it publishes the changes of %s, too.', p.pubname, s.schema_name, {retired}::text),
       format('Before 90_rollback, make an empty table %s on the subscriber, or publish the tables by name.', {retired}::text)
  FROM publication p, source s WHERE p.publishes AND NOT p.puballtables AND NOT p.by_name
ORDER BY 1, 2

-- name: base_type
-- The column's type, of a domain what it is made of.
WITH RECURSIVE kind AS (
  SELECT atttypid AS oid, atttypmod AS modifier, attcollation AS collation FROM pg_attribute WHERE attrelid = {oid} AND attname = {key}
  UNION ALL SELECT t.typbasetype, t.typtypmod, k.collation FROM kind k JOIN pg_type t ON t.oid = k.oid WHERE t.typtype = 'd')
SELECT format_type(k.oid, k.modifier) || CASE WHEN k.collation <> t.typcollation THEN format(' COLLATE %s', k.collation::regcollation) ELSE '' END
  FROM kind k JOIN pg_type t ON t.oid = k.oid WHERE t.typtype <> 'd'

-- name: privileges
-- What the role that runs this may do; the plan says which GRANT is missing.
SELECT pg_has_role(c.relowner, 'USAGE') AS owner, pg_get_userbyid(c.relowner) AS owner_name, quote_ident(current_user) AS me,
       quote_ident(n.nspname) AS schema, quote_ident(current_database()) AS own_database,
       (SELECT array_agg(rolname::text) FROM pg_roles WHERE rolsuper) AS superusers,
       has_schema_privilege(n.oid, 'CREATE') AS schema_create, has_database_privilege(current_database(), 'CREATE') AS database_create,
       has_database_privilege(current_database(), 'TEMP') AS database_temp,
       current_database() AS database,
       (SELECT rolsuper FROM pg_roles WHERE rolname = current_user) AS superuser,
       pg_has_role('pg_read_all_stats', 'USAGE') AS sees_activity, current_setting('transaction_read_only')::boolean AS read_only
  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = {oid}

-- name: rights_missing
-- Of what the owner has, or should have, by its table: each right for want of which a later step would be refused, with the GRANT
-- that gives it. A superuser's never; `anew` where tables are made, as no repair does.
WITH source AS (
  SELECT c.*, format('%I.%I', n.nspname, c.relname) AS qualified, quote_ident(n.nspname) AS schema_name, quote_ident(pg_get_userbyid(c.relowner)) AS owner_name,
         quote_ident(current_user) AS me, pg_has_role(c.relowner, 'USAGE') AS member, c.relowner = (SELECT oid FROM pg_roles WHERE rolname = current_user) AS own,
         (SELECT rolsuper FROM pg_roles WHERE rolname = current_user) AS superuser, current_setting('server_version_num')::int AS version
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = {oid})
SELECT 'blocker' AS level, s.qualified AS object, format('%s, whom what is made for %s is given to, may not create in schema %s.', s.owner_name, s.qualified, s.schema_name) AS sentence,
       format('GRANT CREATE ON SCHEMA %s TO %s;', s.schema_name, s.owner_name) AS way_out
  FROM source s WHERE {anew} AND s.member AND NOT s.own AND NOT s.superuser AND NOT has_schema_privilege(s.relowner, s.relnamespace, 'CREATE')
UNION ALL
SELECT 'blocker', s.qualified, format('%s is a member of %s that may not SET ROLE to it, and so cannot give it what is made for %s.', s.me, s.owner_name, s.qualified),
       format('GRANT %s TO %s WITH SET TRUE;', s.owner_name, s.me)
  FROM source s WHERE {anew} AND s.member AND NOT pg_has_role(s.relowner, CASE WHEN s.version >= 160000 THEN 'SET' ELSE 'MEMBER' END)
UNION ALL
SELECT DISTINCT 'blocker', a.atttypid::regtype::text, format('%s may not use the type %s, which %s has.', s.me, a.atttypid::regtype, s.qualified),
       format('GRANT USAGE ON TYPE %s TO %s;', coalesce((SELECT e.oid::regtype FROM pg_type e WHERE e.typarray = a.atttypid), a.atttypid::regtype), s.me)
  FROM source s JOIN pg_attribute a ON a.attrelid = s.oid AND a.attnum > 0 AND NOT a.attisdropped WHERE {anew} AND NOT has_type_privilege(a.atttypid, 'USAGE')
UNION ALL
SELECT DISTINCT 'blocker', t.spcname::text, format('%s may not create in the tablespace %s, where %s lies.', s.me, t.spcname, r.oid::regclass), format('GRANT CREATE ON TABLESPACE %I TO %s;', t.spcname, s.me)
  FROM source s JOIN pg_class r ON r.oid = s.oid OR r.oid IN (SELECT indexrelid FROM pg_index WHERE indrelid = s.oid) JOIN pg_tablespace t ON t.oid = r.reltablespace
 WHERE {anew} AND NOT has_tablespace_privilege(t.oid, 'CREATE')
UNION ALL
SELECT 'blocker', l.lanname, format('%s may not use the language %s, which functions of the runbook are written in.', s.me, l.lanname), format('GRANT USAGE ON LANGUAGE %I TO %s;', l.lanname, s.me)
  FROM source s, pg_language l WHERE l.lanname IN ('plpgsql', 'sql') AND NOT has_language_privilege(l.oid, 'USAGE')
UNION ALL
SELECT 'blocker', s.qualified, format('%s may not %s %s.', s.me, r.what, s.qualified), format('GRANT %s ON %s TO %s;', r.gives, s.qualified, s.me)
  FROM source s CROSS JOIN LATERAL (VALUES
       ('lock', CASE WHEN s.version >= 170000 THEN 'MAINTAIN' ELSE 'UPDATE' END, 'UPDATE, DELETE, TRUNCATE' || CASE WHEN s.version >= 170000 THEN ', MAINTAIN' ELSE '' END),
       ('make triggers on', 'TRIGGER', 'TRIGGER'),
       ('make anew the foreign keys that reference', 'REFERENCES', CASE WHEN EXISTS (SELECT FROM pg_constraint WHERE confrelid = s.oid AND contype = 'f') THEN 'REFERENCES' ELSE 'SELECT' END)
       ) r(what, gives, needs) WHERE s.member AND NOT has_table_privilege(s.oid, r.needs)
UNION ALL
-- By ON UPDATE CASCADE its owner updates it, whoever changed the row that it refers to.
SELECT DISTINCT 'blocker', c.oid::regclass::text, format('%s may not %s %s, which references %s.', w.who, r.what, c.oid::regclass, s.qualified),
       format('GRANT %s ON %s TO %s;', r.needs, c.oid::regclass, w.who)
  FROM source s JOIN pg_constraint k ON k.confrelid = s.oid AND k.contype = 'f' AND k.conrelid <> s.oid
 CROSS JOIN LATERAL (SELECT k.conrelid UNION SELECT relid FROM pg_partition_tree(k.conrelid)) t(oid) JOIN pg_class c ON c.oid = t.oid
 CROSS JOIN (VALUES ('read', 'SELECT', true), ('update', 'UPDATE', true), ('make triggers on', 'TRIGGER', false)) r(what, needs, as_owner)
 CROSS JOIN LATERAL (SELECT CASE WHEN r.as_owner THEN quote_ident(pg_get_userbyid(c.relowner)) ELSE s.me END) w(who)
 WHERE pg_has_role(c.relowner, 'USAGE')
   AND NOT CASE WHEN r.as_owner THEN has_table_privilege(c.relowner, c.oid, r.needs) ELSE has_table_privilege(c.oid, r.needs) END
UNION ALL
SELECT DISTINCT 'blocker', p.oid::regprocedure::text, format('%s may not execute %s, which a check, an index or a generated column of %s calls.', s.me, p.oid::regprocedure, s.qualified),
       format('GRANT EXECUTE ON FUNCTION %s TO %s;', p.oid::regprocedure, s.me)
  FROM source s CROSS JOIN pg_depend d JOIN pg_proc p ON d.refclassid = 'pg_proc'::regclass AND p.oid = d.refobjid
 WHERE {anew} AND (d.classid = 'pg_constraint'::regclass AND d.objid IN (SELECT oid FROM pg_constraint WHERE conrelid = s.oid)
                   OR d.classid = 'pg_class'::regclass AND d.objid IN (SELECT indexrelid FROM pg_index WHERE indrelid = s.oid)
                   OR d.classid = 'pg_attrdef'::regclass AND d.objid IN (SELECT f.oid FROM pg_attrdef f JOIN pg_attribute a ON (a.attrelid, a.attnum) = (f.adrelid, f.adnum)
                                                                          WHERE f.adrelid = s.oid AND a.attgenerated <> ''))
   AND NOT has_function_privilege(p.oid, 'EXECUTE')
UNION ALL
-- Two that work side by side, who looks on, and one that writes down what failed; a superuser is not held to it.
SELECT 'blocker', session_user, format('%s may have no more than %s sessions at a time, and the steps need four.', quote_ident(session_user), r.rolconnlimit),
       format('ALTER ROLE %I CONNECTION LIMIT 4; or more.', session_user)
  FROM pg_roles r WHERE r.rolname = session_user AND NOT r.rolsuper AND r.rolconnlimit BETWEEN 0 AND 3
UNION ALL
SELECT 'blocker', d.datname, format('%I takes no more than %s sessions at a time, and the steps need four beside the application''s.', d.datname, d.datconnlimit),
       format('ALTER DATABASE %I CONNECTION LIMIT -1; or some more.', d.datname)
  FROM pg_database d JOIN pg_roles r ON r.rolname = session_user WHERE d.datname = current_database() AND NOT r.rolsuper AND d.datconnlimit BETWEEN 0 AND 3

-- name: owned
SELECT pg_has_role(c.relowner, 'USAGE') AS owned FROM pg_class c WHERE c.oid = {oid}

-- name: relations
-- Names in a schema that are taken: tables, indexes, sequences, views.
SELECT relname AS name FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = {schema}

-- name: subscribed
SELECT s.subname AS name FROM pg_subscription_rel r JOIN pg_subscription s ON s.oid = r.srsubid WHERE r.srrelid = {oid}

-- name: prepare_definition
-- A fingerprint of all that a plan rests on, what is carried over included; the log's own triggers are not part of it.
PREPARE {name} AS SELECT md5(string_agg(line, E'\n' ORDER BY line)) AS fingerprint FROM ({lines}) part

-- name: prepared
SELECT EXISTS (SELECT FROM pg_prepared_statements WHERE name = {name})

-- name: definition
EXECUTE {name}

-- name: lines
-- What a table is, line by line, each with what it is about.
  SELECT 'column ' || a.attname AS what,
         concat_ws(' ', 'column', a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull, a.attidentity, a.attgenerated,
                   pg_get_expr(d.adbin, d.adrelid), a.attcollation::regcollation, a.attstorage, to_jsonb(a) ->> 'attcompression',
                   nullif(to_jsonb(a) ->> 'attstattarget', '-1'), a.attoptions, col_description(a.attrelid, a.attnum),
                   (SELECT concat_ws(' ', i.objid::regclass, to_jsonb(q) - 'seqrelid') FROM pg_depend i JOIN pg_sequence q ON q.seqrelid = i.objid WHERE i.classid = 'pg_class'::regclass AND i.refclassid = 'pg_class'::regclass
                       AND (i.refobjid, i.refobjsubid, i.deptype) = (a.attrelid, a.attnum, 'i'))) AS line
    FROM pg_attribute a LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
   WHERE a.attrelid = {oid} AND a.attnum > 0 AND NOT a.attisdropped
  UNION ALL
  SELECT 'index ' || indexrelid::regclass, concat_ws(' ', 'index', pg_get_indexdef(indexrelid), indisvalid, indisclustered, obj_description(indexrelid, 'pg_class'))
    FROM pg_index WHERE indrelid = {oid}
  UNION ALL
  SELECT format('constraint %s of %s', conname, conrelid::regclass),
         concat_ws(' ', 'constraint', conname, pg_get_constraintdef(oid), convalidated, conrelid::regclass,
                   (SELECT 'partitioned' FROM pg_class r WHERE r.oid = conrelid AND r.relkind = 'p' AND conrelid <> {oid}),
                   -- The role column is NOT NULL where the key's columns are.
                   (SELECT string_agg(a.attnotnull::text, ' ' ORDER BY a.attnum) FROM pg_attribute a JOIN pg_class t ON t.oid = confrelid AND t.relkind = 'r'
                     WHERE a.attrelid = conrelid AND a.attnum = ANY (conkey) AND conrelid <> {oid})) FROM pg_constraint
   WHERE (conrelid = {oid} OR confrelid = {oid}) AND conparentid = 0  -- not what each partition of another table has of it
  UNION ALL
  SELECT concat_ws(' ', kind, name), concat_ws(' ', kind, name, definition) FROM ({carried}) c
  UNION ALL
  -- Of all tables, or of a schema: on 14 the catalog of the latter is not there, and in pg_depend nothing is of it.
  SELECT 'publication ' || p.pubname, concat_ws(' ', 'publication', p.pubname, p.pubviaroot) FROM pg_publication p
   WHERE p.puballtables OR p.oid IN (
         SELECT of.refobjid FROM pg_depend s JOIN pg_depend of ON (of.classid, of.objid) = (s.classid, s.objid) AND of.refclassid = 'pg_publication'::regclass
          WHERE s.classid = to_regclass('pg_publication_namespace') AND s.refclassid = 'pg_namespace'::regclass
            AND s.refobjid = (SELECT relnamespace FROM pg_class WHERE oid = {oid}))
  UNION ALL
  SELECT 'owner, options or comment', concat_ws(' ', 'table', relname, relnamespace::regnamespace, relreplident, reloptions, reltablespace,
                   pg_get_userbyid(relowner), obj_description(oid, 'pg_class')) FROM pg_class WHERE oid = {oid}
  UNION ALL
  SELECT DISTINCT 'view ' || r.ev_class::regclass, concat_ws(' ', 'view', r.ev_class::regclass, pg_get_ruledef(r.oid)) FROM pg_depend d JOIN pg_rewrite r ON r.oid = d.objid
   WHERE d.classid = 'pg_rewrite'::regclass AND d.refclassid = 'pg_class'::regclass AND d.refobjid = {oid}
  UNION ALL
  SELECT 'inheritance of ' || other, concat_ws(' ', 'inheritance', other, i.inhparent = {oid}) FROM pg_inherits i JOIN pg_class t ON t.oid = {oid} AND t.relkind = 'r'
   CROSS JOIN LATERAL (SELECT CASE i.inhparent WHEN t.oid THEN i.inhrelid ELSE i.inhparent END::regclass AS other) o WHERE t.oid IN (i.inhparent, i.inhrelid)
  UNION ALL
  SELECT 'subscription ' || s.subname, 'subscription ' || s.subname FROM pg_subscription_rel r JOIN pg_subscription s ON s.oid = r.srsubid WHERE r.srrelid = {oid}
  UNION ALL
  SELECT format('its rows in column %I of %s', a.attname, a.attrelid::regclass), 'held'
    FROM pg_class t JOIN pg_type y ON y.oid = t.reltype JOIN pg_depend d ON d.refclassid = 'pg_type'::regclass AND d.refobjid IN (y.oid, y.typarray)
    JOIN pg_attribute a ON d.classid = 'pg_class'::regclass AND (a.attrelid, a.attnum) = (d.objid, d.objsubid)
    JOIN pg_class h ON h.oid = a.attrelid AND h.relkind IN ('r', 'p', 'm') WHERE t.oid = {oid}

-- name: labels_gone
-- Values of an enumeration that it has no more: they were renamed.
SELECT v.value FROM unnest({values}::text[]) v(value) JOIN pg_type t ON t.oid = to_regtype({type}) AND t.typtype = 'e'
 WHERE NOT EXISTS (SELECT FROM pg_enum e WHERE e.enumtypid = t.oid AND e.enumlabel = v.value)

-- name: gone
SELECT format('%s.%s.%s', w.schema, w.table, w.column) AS what FROM unnest({schemas}::text[], {tables}::text[], {columns}::text[]) w(schema, "table", "column")
 WHERE NOT EXISTS (SELECT FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid JOIN pg_namespace n ON n.oid = c.relnamespace
                    WHERE (n.nspname, c.relname, a.attname) = (w.schema, w.table, w.column) AND NOT a.attisdropped)

-- name: reader
-- Who reads what, and whether policies bind its owner, too, and so us.
SELECT quote_ident(current_user) AS me, quote_ident(pg_get_userbyid(relowner)) AS owner,
       pg_has_role(relowner, 'MEMBER') AND NOT pg_has_role(relowner, 'USAGE') AS dormant, format('%I.%I', (SELECT nspname FROM pg_namespace n WHERE n.oid = relnamespace), relname) AS table,
       relforcerowsecurity AND row_security_active(oid) AS bound FROM pg_class WHERE oid = {oid}

-- name: computed_from
-- Generated columns that are computed from a column; before 15 the column itself depends on it, since then its expression.
SELECT g.attname AS name FROM pg_attribute g JOIN pg_attrdef d ON d.adrelid = g.attrelid AND d.adnum = g.attnum
 WHERE g.attrelid = {oid} AND g.attgenerated <> '' AND EXISTS (
       SELECT FROM pg_depend p JOIN pg_attribute a ON a.attrelid = p.refobjid AND a.attnum = p.refobjsubid
        WHERE p.refclassid = 'pg_class'::regclass AND p.refobjid = {oid} AND a.attname = {key}
          AND (p.classid = 'pg_attrdef'::regclass AND p.objid = d.oid OR p.classid = 'pg_class'::regclass AND (p.objid, p.objsubid) = (g.attrelid, g.attnum)))

-- name: stored
-- Generated columns that are stored: the condition of rows that hold another value than the expression gives today, and a column by
-- whose update it is computed again.
SELECT g.attname AS name, format('%I::text IS DISTINCT FROM (%s)::%s::text', g.attname, pg_get_expr(d.adbin, d.adrelid), format_type(g.atttypid, g.atttypmod)) AS otherwise,
       (SELECT quote_ident(a.attname) FROM pg_depend p JOIN pg_attribute a ON a.attrelid = p.refobjid AND a.attnum = p.refobjsubid
         WHERE p.refclassid = 'pg_class'::regclass AND p.refobjid = {oid} AND a.attgenerated = ''
           AND (p.classid = 'pg_attrdef'::regclass AND p.objid = d.oid OR p.classid = 'pg_class'::regclass AND (p.objid, p.objsubid) = (g.attrelid, g.attnum))
         ORDER BY a.attnum LIMIT 1) AS base
  FROM pg_attribute g JOIN pg_attrdef d ON d.adrelid = g.attrelid AND d.adnum = g.attnum WHERE g.attrelid = {oid} AND g.attgenerated = 's' ORDER BY g.attnum

-- name: held_otherwise
SELECT count(*) FROM (SELECT * FROM ONLY {source} LIMIT {size}) held WHERE {otherwise}

-- name: quoted
SELECT quote_ident({name})

-- name: reads_rows
SELECT EXISTS (SELECT FROM pg_index WHERE indrelid = {oid} AND concat(indexprs, indpred) LIKE '%:varattno 0 %')

-- name: row_variables
-- Functions that have variables of the table's row type: a session that ran one keeps the type's number until it ends.
SELECT p.oid::regprocedure::text AS function FROM pg_proc p JOIN pg_language l ON l.oid = p.prolang
 WHERE l.lanname = 'plpgsql' AND p.prosrc ~* format('\m%s"?\s*(\[\s*\]|;|:=|\mdefault\M|%%\s*rowtype\M)', regexp_replace({name}, '(\W)', '\\\1', 'g')) ORDER BY 1

-- name: member
SELECT pg_has_role({role}, 'MEMBER')

-- name: filenode
-- Which file the table lies in: another one means rewritten or truncated, and that the copy must start again.
SELECT pg_relation_filenode({oid}::oid)

-- name: guards
-- Unique keys that lack the partition key: the name, expression, collation and operator class of each part, and its operator of
-- equality, which a type of an extension has in a schema of its own; and the columns that they are made of.
SELECT x.relname AS index, p.parts,
       ARRAY(SELECT format('OPERATOR(%I.%s)', os.nspname, o.oprname) FROM unnest(i.indclass::oid[]) WITH ORDINALITY u(class, n)
               JOIN pg_opclass c ON c.oid = u.class
               JOIN pg_amop e ON (e.amopfamily, e.amoplefttype, e.amoprighttype, e.amopstrategy) = (c.opcfamily, c.opcintype, c.opcintype, 3)
               JOIN pg_operator o ON o.oid = e.amopopr JOIN pg_namespace os ON os.oid = o.oprnamespace ORDER BY n) AS operators,
       pg_get_expr(i.indpred, i.indrelid) AS predicate,
       coalesce((to_jsonb(i) ->> 'indnullsnotdistinct')::boolean, false) AS nulls_not_distinct, NOT i.indimmediate AS deferrable,
       ARRAY(SELECT a.attname::text FROM pg_attribute a WHERE a.attrelid = i.indrelid AND a.attnum > 0 AND (a.attnum = ANY (i.indkey::int2[])
                OR EXISTS (SELECT FROM pg_depend g WHERE g.classid = 'pg_class'::regclass AND g.objid = i.indexrelid
                              AND g.refobjid = i.indrelid AND g.refobjsubid = a.attnum)) ORDER BY a.attnum) AS watched
  FROM pg_index i JOIN pg_class x ON x.oid = i.indexrelid
 CROSS JOIN LATERAL (
       SELECT jsonb_agg(jsonb_build_array(coalesce(  -- an error's detail names these: the columns where they are some, each once
                (SELECT a.attname FROM pg_attribute a WHERE a.attrelid = i.indrelid AND a.attnum = i.indkey[n - 1] AND a.attnum > 0
                    AND a.attnum <> ALL (i.indkey[0:n - 2])), 'expression ' || n), pg_get_indexdef(i.indexrelid, n, false),
                concat_ws(' ', 'COLLATE ' || (SELECT format('%I.%I', cn.nspname, c.collname) FROM pg_collation c JOIN pg_namespace cn ON cn.oid = c.collnamespace
                                               WHERE c.oid = i.indcollation[n - 1]),
                          (SELECT format('%I.%I', o.nspname, c.opcname) FROM pg_opclass c JOIN pg_namespace o ON o.oid = c.opcnamespace
                            WHERE c.oid = i.indclass[n - 1] AND NOT c.opcdefault))) ORDER BY n) AS parts
         FROM generate_series(1, i.indnkeyatts) n) p
 WHERE i.indrelid = {oid} AND i.indisunique AND i.indisvalid
   AND NOT EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = i.indrelid AND a.attname = {key} AND a.attnum = ANY (i.indkey[0:i.indnkeyatts - 1]))
 ORDER BY i.indisprimary DESC, x.relname

-- name: key_equals
-- What compares each column of the primary key: under another search_path "=" may be another operator, or none.
SELECT format('OPERATOR(%I.%s)', os.nspname, o.oprname) AS equals
  FROM pg_index i CROSS JOIN unnest(i.indclass::oid[]) WITH ORDINALITY u(class, n)
  JOIN pg_opclass c ON c.oid = u.class
  JOIN pg_amop e ON (e.amopfamily, e.amoplefttype, e.amoprighttype, e.amopstrategy) = (c.opcfamily, c.opcintype, c.opcintype, 3)
  JOIN pg_operator o ON o.oid = e.amopopr JOIN pg_namespace os ON os.oid = o.oprnamespace
 WHERE i.indrelid = {oid} AND i.indisprimary ORDER BY u.n

-- name: schemas
SELECT nspname::text AS name FROM pg_namespace

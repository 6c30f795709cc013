// What both versions of the application share: the connection, and a report of what became of each thing that they did.
import { drizzle } from 'drizzle-orm/node-postgres';
import { Pool } from 'pg';

type Cause = { code?: string; constraint?: string; message?: string };

export async function clinic(work: (db: ReturnType<typeof drizzle>, step: Step) => Promise<void>): Promise<void> {
  const pool = new Pool({ host: process.argv[2], port: Number(process.argv[3]), user: 'postgres', database: process.argv[4], max: 1 });
  const report: Record<string, string> = {};
  const step: Step = async (name, action) => {
    try {
      const done = await action();
      report[name] = 'ok';
      return done;
    } catch (error) {
      const cause = ((error as { cause?: Cause }).cause ?? error) as Cause;
      report[name] = cause.code ? `${cause.code} ${cause.constraint ?? ''}`.trim() : String(cause.message);
      return undefined;
    }
  };
  try {
    await work(drizzle(pool), step);
  } finally {
    await pool.end();
  }
  console.log(JSON.stringify(report));
}

export type Step = <T>(name: string, action: () => Promise<T>) => Promise<T | undefined>;

export function expect(what: string, held: boolean): void {
  if (!held) throw new Error(`not so: ${what}`);
}

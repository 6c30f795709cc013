// The application after the migration, on the schema that 07_application wrote; what it says to change is changed.
import { and, eq } from 'drizzle-orm';
import { clinic, expect } from '../clinic';
import { appointmentSchema, doctorSchema, userSchema } from './schema';

const person = (email: string) => ({ email, password: 'hash', firstName: 'A', lastName: 'Writer' });

void clinic(async (db, step) => {
  const [doc] = await db.select({ id: doctorSchema.id }).from(doctorSchema).limit(1);
  const users: (typeof userSchema.$inferSelect)[] = [];
  for (const [name, role] of [['patient', undefined], ['doctor', 'doctor']] as const) {
    const made = await step(`create ${name}`, () => db.insert(userSchema).values({ ...person(`${name}@app.example`), role }).returning());
    if (made) users.push(made[0]);
  }
  for (const user of users) {
    const name = user.role === 'doctor' ? 'doctor' : 'patient';
    const own = and(eq(userSchema.id, user.id), eq(userSchema.role, user.role));
    await step(`read ${name}`, async () => {
      const [found] = await db.select().from(userSchema).where(own);
      expect('the user is found by id and role', found.email === user.email);
    });
    await step(`update ${name}`, async () => {
      const done = await db.update(userSchema).set({ phone: '+1-555-0100' }).where(own).returning();
      expect('one user is changed', done.length === 1 && done[0].phone === '+1-555-0100');
    });
    const booked = await step(`book for ${name}`, () =>
      db.insert(appointmentSchema).values({ userId: user.id, userRole: user.role, docId: doc.id, scheduledAt: new Date() }).returning(),
    );
    if (booked) {
      await step(`cancel for ${name}`, async () => {
        const rows = await db.update(appointmentSchema).set({ status: 'cancelled' }).where(eq(appointmentSchema.id, booked[0].id)).returning();
        expect('one appointment is cancelled', rows.length === 1 && rows[0].userRole === user.role);
      });
      await step(`list for ${name}`, async () => {
        const rows = await db
          .select()
          .from(appointmentSchema)
          .innerJoin(userSchema, and(eq(userSchema.id, appointmentSchema.userId), eq(userSchema.role, appointmentSchema.userRole)))
          .where(own);
        expect('one appointment is listed', rows.length === 1 && rows[0].users.id === user.id);
      });
    }
    await step(`upsert ${name} by key`, () =>
      db
        .insert(userSchema)
        .values({ ...person(user.email), id: user.id, role: user.role })
        .onConflictDoUpdate({ target: [userSchema.id, userSchema.role], set: { lastName: 'Again' } }),
    );
    await step(`book for ${name} with another role`, () =>
      db.insert(appointmentSchema).values({ userId: user.id, userRole: 'admin', docId: doc.id, scheduledAt: new Date() }),
    );
    await step(`delete ${name}`, async () => {
      const gone = await db.delete(userSchema).where(own).returning();
      const left = await db.select().from(appointmentSchema).where(eq(appointmentSchema.userId, user.id));
      expect('the user is gone, and the appointments too', gone.length === 1 && left.length === 0);
    });
  }
  await step('a number for a name does not compile', async () => {
    // @ts-expect-error: the types are those of the columns
    const wrong: typeof appointmentSchema.$inferInsert = { userId: 'x', userRole: 1, docId: 'x', scheduledAt: new Date() };
    expect('this line is only here to be compiled', wrong.userId === 'x');
  });
});

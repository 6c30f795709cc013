// The application before the migration: it has never heard of user_role.
import { and, eq } from 'drizzle-orm';
import { clinic, expect } from './clinic';
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
    await step(`read ${name}`, async () => {
      const [found] = await db.select().from(userSchema).where(eq(userSchema.id, user.id));
      expect('the user is found by id', found.email === user.email);
    });
    await step(`update ${name}`, async () => {
      const done = await db.update(userSchema).set({ phone: '+1-555-0100' }).where(eq(userSchema.email, user.email)).returning();
      expect('one user is changed', done.length === 1 && done[0].phone === '+1-555-0100');
    });
    const booked = await step(`book for ${name}`, () =>
      db.insert(appointmentSchema).values({ userId: user.id, docId: doc.id, scheduledAt: new Date() }).returning(),
    );
    if (booked) {
      await step(`cancel for ${name}`, async () => {
        const rows = await db
          .update(appointmentSchema)
          .set({ status: 'cancelled' })
          .where(and(eq(appointmentSchema.id, booked[0].id), eq(appointmentSchema.userId, user.id)))
          .returning();
        expect('one appointment is cancelled', rows.length === 1);
      });
      await step(`list for ${name}`, async () => {
        const rows = await db.select().from(appointmentSchema).innerJoin(userSchema, eq(userSchema.id, appointmentSchema.userId))
          .where(eq(userSchema.id, user.id));
        expect('one appointment is listed', rows.length === 1 && rows[0].users.id === user.id);
      });
    }
    await step(`upsert ${name} by email`, () =>
      db.insert(userSchema).values(person(user.email)).onConflictDoUpdate({ target: userSchema.email, set: { lastName: 'Again' } }),
    );
    await step(`delete ${name}`, async () => {
      const gone = await db.delete(userSchema).where(eq(userSchema.id, user.id)).returning();
      const left = await db.select().from(appointmentSchema).where(eq(appointmentSchema.userId, user.id));
      expect('the user is gone, and the appointments too', gone.length === 1 && left.length === 0);
    });
  }
});

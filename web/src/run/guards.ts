// Readers of data that nobody vouches for: each gives a fresh value of its type, or one error that names the field.

export class InvalidFileError extends Error {
  override readonly name = "InvalidFileError";
}

/** `path` names the value in messages: "run.steps[3].at". */
export type Reader<T> = (value: unknown, path: string) => T;

export function fail(path: string, problem: string): never {
  throw new InvalidFileError(`${path} ${problem}`);
}

const MAX_TEXT = 1 << 22;

export const text: Reader<string> = (value, path) => {
  if (typeof value !== "string") fail(path, "must be a text");
  if (value.length > MAX_TEXT) fail(path, `is longer than ${MAX_TEXT} characters`);
  return value;
};

export const flag: Reader<boolean> = (value, path) => {
  if (typeof value !== "boolean") fail(path, "must be true or false");
  return value;
};

export function number(min: number = Number.NEGATIVE_INFINITY, max: number = Number.POSITIVE_INFINITY): Reader<number> {
  return (value, path) => {
    if (typeof value !== "number" || !Number.isFinite(value)) fail(path, "must be a number");
    if (value < min || value > max) fail(path, `must be ${range(min, max)}`);
    return value;
  };
}

export function integer(min: number, max: number = Number.MAX_SAFE_INTEGER): Reader<number> {
  const read = number();
  return (value, path) => {
    const whole = read(value, path);
    if (!Number.isSafeInteger(whole)) fail(path, "must be a whole number");
    if (whole < min || whole > max) fail(path, `must be ${range(min, max)}`);
    return whole;
  };
}

function range(min: number, max: number): string {
  return max >= Number.MAX_SAFE_INTEGER ? `at least ${min}` : `from ${min} to ${max}`;
}

export function oneOf<const T extends string>(...choices: T[]): Reader<T> {
  return (value, path) => {
    const choice = choices.find((known) => known === value);
    if (choice === undefined) fail(path, `must be ${choices.map((known) => `"${known}"`).join(" or ")}`);
    return choice;
  };
}

export function nullable<T>(read: Reader<T>): Reader<T | null> {
  return (value, path) => (value === null ? null : read(value, path));
}

export function either<A, B>(isFirst: (value: unknown) => boolean, first: Reader<A>, second: Reader<B>): Reader<A | B> {
  return (value, path) => (isFirst(value) ? first(value, path) : second(value, path));
}

export function list<T>(read: Reader<T>, maxLength: number): Reader<T[]> {
  return (value, path) => {
    if (!Array.isArray(value)) fail(path, "must be a list");
    if (value.length > maxLength) fail(path, `has ${value.length} entries: at most ${maxLength} are read`);
    return value.map((entry: unknown, i) => read(entry, `${path}[${i}]`));
  };
}

/** An object used as a table, keys free. */
export function table<T>(read: Reader<T>, maxLength: number): Reader<Record<string, T>> {
  return (value, path) => {
    const entries = Object.entries(record(value, path));
    if (entries.length > maxLength) fail(path, `has ${entries.length} entries: at most ${maxLength} are read`);
    return Object.fromEntries(entries.map(([key, entry]) => [key, read(entry, `${path}.${key}`)]));
  };
}

class Optional<T> {
  readonly read: Reader<T>;

  constructor(read: Reader<T>) {
    this.read = read;
  }
}

export function optional<T>(read: Reader<T>): Optional<T> {
  return new Optional(read);
}

type Shape<T> = {
  [K in keyof T]-?: object extends Pick<T, K> ? Optional<Exclude<T[K], undefined>> : Reader<T[K]>;
};

/** An object of known fields, each with its reader, `optional` exactly where `T` has it so. Others are left out. */
export function object<T extends object>(shape: Shape<T>): Reader<T> {
  const fields = Object.entries<Reader<unknown> | Optional<unknown>>(shape);
  return (value, path) => {
    const given = record(value, path);
    const entries = fields.flatMap(([name, reader]): [string, unknown][] => {
      const field = Object.hasOwn(given, name) ? given[name] : undefined;
      if (reader instanceof Optional) return field === undefined ? [] : [[name, reader.read(field, `${path}.${name}`)]];
      if (field === undefined) fail(`${path}.${name}`, "is missing");
      return [[name, reader(field, `${path}.${name}`)]];
    });
    return Object.fromEntries(entries) as T;
  };
}

function record(value: unknown, path: string): Record<string, unknown> {
  if (typeof value !== "object" || value === null || Array.isArray(value)) fail(path, "must be an object");
  return value as Record<string, unknown>;
}

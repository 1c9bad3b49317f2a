// A tar of files that the browser reads as it sends them. Each file as a part of its own would have all of them open at
// once, and a browser gives up at some thousand.

const BLOCK = 512;
const encoder = new TextEncoder();

export function tarOf(files) { // [{ file, name }] to a Blob
  const parts = [];
  for (const { file, name } of files) {
    const record = paxRecord(encoder.encode(` path=${name}\n`));
    parts.push(header(record.length, 'x'), ...padded(record), header(file.size, '0'), ...padded(file));
  }
  parts.push(new Uint8Array(2 * BLOCK));
  return new Blob(parts);
}

// POSIX.1-2001: names in UTF-8, of any length, behind the record's own length in digits.
function paxRecord(text) {
  let length = text.length;
  while (String(length).length + text.length > length) length = String(length).length + text.length;
  const digits = encoder.encode(String(length));
  const record = new Uint8Array(digits.length + text.length);
  record.set(digits);
  record.set(text, digits.length);
  return record;
}

function padded(content) {
  const over = (content.size ?? content.length) % BLOCK;
  return over ? [content, new Uint8Array(BLOCK - over)] : [content];
}

function header(size, type) {
  const block = new Uint8Array(BLOCK);
  const write = (text, at) => block.set(encoder.encode(text), at);
  write('file', 0); // the name is in the record before
  for (const at of [108, 116]) write('0000000', at); // owner and group
  write('0000644', 100);
  write(size.toString(8).padStart(11, '0'), 124);
  write('00000000000', 136); // no time
  write(' '.repeat(8), 148); // what the sum counts its own place as
  write(type, 156);
  write('ustar\x0000', 257);
  const sum = block.reduce((total, byte) => total + byte, 0);
  write(`${sum.toString(8).padStart(6, '0')}\0 `, 148);
  return block;
}

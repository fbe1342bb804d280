// Code -> its parts: comments, strings, numbers, keywords, names of functions. Close enough to read by, no grammar.

const NUMBER = String.raw`\b(?:0[xX][\da-fA-F_]+|\d[\d_]*(?:\.\d+)?(?:[eE][+-]?\d+)?)\b`;
const DOUBLE = String.raw`"(?:\\.|[^"\\\n])*"?`;
const SINGLE = String.raw`'(?:\\.|[^'\\\n])*'?`;
const BACKTICK = "`(?:\\\\[\\s\\S]|[^`\\\\])*`?";
const WORD = String.raw`[A-Za-z_$][\w$]*`;
const SLASHES = String.raw`\/\/[^\n]*|\/\*[\s\S]*?(?:\*\/|$)`;

const C_WORDS = `abstract as async auto await bool boolean break byte case catch char class const continue debugger
  default defer delete do double else enum export extends extern false final finally float fn for from func function
  go goto if impl implements import in instanceof int interface let long loop match mod move mut namespace new nil
  null of operator override package private protected pub public return self short signed sizeof static struct super
  switch template this throw throws trait true try type typedef typeof undefined union unsafe unsigned use using var
  virtual void volatile where while yield`;
const PYTHON_WORDS = `False None True and as assert async await break case class continue def del elif else except
  finally for from global if import in is lambda match nonlocal not or pass raise return self try while with yield`;
const SHELL_WORDS = `alias case cd do done echo elif else esac exec exit export fi for function if in local read
  return set shift source sudo then trap unset until while`;
const RUBY_WORDS = `begin class def do else elsif end ensure false if module nil require rescue return self then true
  unless until when while yield`;
const SQL_WORDS = `add all alter and as asc between by case create cross default delete desc distinct drop else end
  exists foreign from full group having in index inner insert into is join key left like limit not null offset on or
  order outer primary references right select set table then union unique update values view when where with`;

function family(words, comment, strings) {
  const pattern = `(?<comment>${comment})|(?<string>${strings})|(?<number>${NUMBER})|(?<word>${WORD})`;
  return { pattern: new RegExp(pattern, "g"), words: new Set(words.split(/\s+/)) };
}

const C = family(C_WORDS, SLASHES, [DOUBLE, SINGLE, BACKTICK].join("|"));
const PYTHON = family(
  PYTHON_WORDS,
  "#[^\\n]*",
  [`"""[\\s\\S]*?(?:"""|$)`, `'''[\\s\\S]*?(?:'''|$)`, DOUBLE, SINGLE].join("|"),
);
const SHELL = family(SHELL_WORDS, "(?<![\\w$&])#[^\\n]*", `"(?:\\\\.|[^"\\\\])*"?|'[^']*'?`);
const RUBY = family(RUBY_WORDS, "#[^\\n]*", `${DOUBLE}|${SINGLE}`);
const SQL = family(SQL_WORDS, "--[^\\n]*", `${DOUBLE}|${SINGLE}`);
const JSON_TEXT = family("true false null", "\\/\\/[^\\n]*", DOUBLE);
const MARKUP = {
  pattern: new RegExp(
    [
      String.raw`(?<comment><!--[\s\S]*?(?:-->|$))`,
      String.raw`(?<keyword><\/?[\w:-]+|\/?>)`,
      String.raw`(?<string>"[^"]*"|'[^']*')`,
      String.raw`(?<name>(?<![\w:-])[\w:-]+(?==))`,
    ].join("|"),
    "g",
  ),
  words: new Set(),
};

const NAMES_OF_FAMILIES = [
  [C, "js javascript jsx ts typescript tsx mjs java c h cpp c++ cc cs csharp go golang rust rs swift kotlin kt"],
  [C, "php dart scala css scss less proto"],
  [PYTHON, "py python python3 pycon"],
  [SHELL, "sh bash shell zsh console yaml yml toml ini dockerfile makefile"],
  [RUBY, "ruby rb perl r elixir"],
  [SQL, "sql postgresql mysql sqlite"],
  [JSON_TEXT, "json jsonc json5 jsonl"],
  [MARKUP, "html xml svg vue"],
];
const LANGUAGES = new Map(
  NAMES_OF_FAMILIES.flatMap(([known, names]) => names.split(" ").map((name) => [name, known])),
);

/** Pairs of a kind (null, comment, string, number, keyword, name) and a text, which together are the code. */
export function partsOf(code, language) {
  const known = LANGUAGES.get(language);
  if (known === undefined) return [[null, code]];
  const parts = [];
  let done = 0;
  for (const match of code.matchAll(known.pattern)) {
    if (match.index > done) parts.push([null, code.slice(done, match.index)]);
    done = match.index + match[0].length;
    parts.push([kindOf(match, known, code[done]), match[0]]);
  }
  if (done < code.length) parts.push([null, code.slice(done)]);
  return parts;
}

function kindOf(match, known, next) {
  const [kind] = Object.entries(match.groups).find(([, text]) => text !== undefined);
  if (kind !== "word") return kind;
  const word = known === SQL ? match[0].toLowerCase() : match[0];
  if (known.words.has(word)) return "keyword";
  return next === "(" ? "name" : null;
}

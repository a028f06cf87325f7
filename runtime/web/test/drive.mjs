// Drive the page in a headless Chromium: what tests/runtime/test_web.py and benchmarks/web.py run.
//
//     node test/drive.mjs CHROMIUM URL < jobs.json > results.json
//
// A job is ["eval", SOURCE] (an async function body run in the page; its result comes back), or
// ["say", TEXT] (typed into the form and sent as a user does; the answer's text comes back, once whole, with
// the number of pieces it came in), or ["text", SELECTOR], ["click", SELECTOR], ["files", SELECTOR, PATHS...],
// ["wait", SOURCE] (until the expression is true), ["reload"], ["size", WIDTH, HEIGHT], ["picture", PATH].
import { readFileSync } from "node:fs";
import puppeteer from "puppeteer-core";

const [executablePath, url] = process.argv.slice(2);
const jobs = JSON.parse(readFileSync(0, "utf-8"));
const browser = await puppeteer.launch({
  executablePath,
  headless: true,
  protocolTimeout: 1_200_000,
  // No sandbox: containers, where this runs, do not let root have one. The page is our own.
  args: ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--disable-background-networking"],
});
const outside = [];
try {
  const page = await browser.newPage();
  page.setDefaultTimeout(1_200_000);
  page.on("request", (request) => {
    const address = request.url();
    if (!address.startsWith(new URL("/", url).href) && !/^(data|blob):/.test(address)) outside.push(address);
  });
  page.on("console", (message) => console.error(`console: ${message.text()}`));
  page.on("pageerror", (error) => console.error(`page: ${error.message}`));
  await page.goto(url);
  const kinds = {
    eval: (source) => page.evaluate(`(async () => { ${source} })()`),
    wait: async (source) => {
      await page.waitForFunction(source);
      return true;
    },
    async reload() {
      await page.reload();
      return true;
    },
    async size(width, height) {
      await page.setViewport({ width, height });
      return true;
    },
    async picture(path) {
      await page.screenshot({ path });
      return true;
    },
    text: (selector) => page.$eval(selector, (element) => element.textContent),
    click: (selector) => page.$eval(selector, (element) => element.click()),
    files: async (selector, ...paths) => (await page.$(selector)).uploadFile(...paths),
    async say(text) {
      await page.evaluate(() => {
        window.seen = [];
        new MutationObserver(() => {
          const last = document.querySelector("#talk .assistant:last-child");
          if (last && last.dataset.source !== window.seen.at(-1)) window.seen.push(last.dataset.source);
        }).observe(document.getElementById("talk"), {
          childList: true, subtree: true, attributes: true, attributeFilter: ["data-source"],
        });
      });
      await page.type("#message", text);
      await page.keyboard.press("Enter");
      await page.waitForFunction(() => !document.getElementById("send").disabled);
      await page.evaluate(() => 0); // the observer's last turn
      return page.evaluate(() => ({ text: window.seen.at(-1), pieces: window.seen.length }));
    },
  };
  const results = [];
  for (const [kind, ...details] of jobs) {
    try {
      results.push({ ok: (await kinds[kind](...details)) ?? null });
    } catch (error) {
      results.push({ error: error.message });
    }
  }
  console.log(JSON.stringify({ browser: await browser.version(), results, outside }));
} finally {
  await browser.close();
}

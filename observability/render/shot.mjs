// Takes pictures of dashboards: node shot.mjs JOBS.json
//
// JOBS is {prometheus, chromium, shots: [{dashboard, from, to, title, out}]}, times in
// seconds since 1970. It serves the page of this directory on a loopback port, and ends
// with 1 if a panel could not be drawn.
import fs from 'node:fs';
import http from 'node:http';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import puppeteer from 'puppeteer-core';

const here = path.dirname(fileURLToPath(import.meta.url));
const jobs = JSON.parse(fs.readFileSync(process.argv[2], 'utf8'));
const types = { '.html': 'text/html', '.js': 'text/javascript', '.css': 'text/css' };
let shot;

const server = http.createServer(async (request, response) => {
  const url = new URL(request.url, 'http://localhost');
  if (url.pathname.startsWith('/api/')) { // the page may ask its own origin only
    const answer = await fetch(jobs.prometheus + request.url);
    response.writeHead(answer.status, { 'content-type': 'application/json' });
    return response.end(await answer.text());
  }
  if (url.pathname === '/shot.json') {
    response.writeHead(200, { 'content-type': 'application/json' });
    return response.end(JSON.stringify({ ...shot, dashboard: JSON.parse(fs.readFileSync(shot.dashboard, 'utf8')) }));
  }
  const files = { '/': 'index.html', '/app.js': 'node_modules/.app.js', '/uplot.css': 'node_modules/uplot/dist/uPlot.min.css' };
  const file = files[url.pathname];
  if (!file) {
    response.writeHead(404);
    return response.end();
  }
  response.writeHead(200, { 'content-type': types[path.extname(file)] });
  fs.createReadStream(path.join(here, file)).pipe(response);
}).listen(0, '127.0.0.1');
await new Promise((done) => server.on('listening', done));
const origin = `http://127.0.0.1:${server.address().port}/`;

const browser = await puppeteer.launch({
  executablePath: jobs.chromium,
  args: ['--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', '--force-color-profile=srgb'],
});
let failed = false;
for (shot of jobs.shots) {
  const page = await browser.newPage();
  page.on('pageerror', (e) => { console.error(shot.out, String(e.stack ?? e).slice(0, 800)); failed = true; });
  page.on('console', (m) => { if (m.text().startsWith('ERR')) { console.error(shot.out, m.text().slice(0, 800)); failed = true; } });
  await page.setViewport({ width: 1400, height: 900 });
  await page.goto(origin);
  await page.waitForFunction('window.drawn !== undefined && window.drawn >= window.panels', { timeout: 60000 });
  const height = await page.evaluate('window.height');
  // Tall ones a little smaller: a picture is to stay below 250 kB.
  await page.setViewport({ width: 1400, height, deviceScaleFactor: height > 2000 ? 0.75 : 1 });
  await new Promise((done) => setTimeout(done, 1500)); // uPlot draws in the frames after
  await page.screenshot({ path: shot.out, optimizeForSpeed: false });
  await page.close();
  console.log(path.basename(shot.out));
}
await browser.close();
server.close();
process.exit(failed ? 1 : 0);

// The page that draws a dashboard. Units, thresholds, value mappings, legends, stacking
// and logarithmic axes are Grafana's own code; heat map, state timeline and table are
// small stand-ins, because the library does not export them.
import React from 'react';
import { createRoot } from 'react-dom/client';
import * as UI from '@grafana/ui';
import * as D from '@grafana/data';

const { ThemeContext, createTheme } = D;
const theme = createTheme({ colors: { mode: 'dark' } });
const unitHeight = 36, width = 1400, head = 44;

const property = (id, path, process, custom) => ({
  id: custom ? 'custom.' + id : id, path, name: id, editor: () => null, override: () => null,
  process: process ?? D.identityOverrideProcessor, shouldApply: () => true, isCustom: custom,
});
const registry = new D.FieldConfigOptionsRegistry(() => [
  property('unit', 'unit', D.unitOverrideProcessor), property('min', 'min', D.numberOverrideProcessor),
  property('max', 'max', D.numberOverrideProcessor), property('decimals', 'decimals', D.numberOverrideProcessor),
  property('displayName', 'displayName', D.displayNameOverrideProcessor), property('noValue', 'noValue', D.stringOverrideProcessor),
  property('color', 'color'), property('thresholds', 'thresholds', D.thresholdsOverrideProcessor),
  property('mappings', 'mappings', D.valueMappingsOverrideProcessor),
  ...['lineWidth', 'fillOpacity', 'drawStyle', 'stacking', 'thresholdsStyle', 'lineInterpolation', 'showPoints', 'spanNulls',
    'axisPlacement', 'gradientMode', 'scaleDistribution', 'axisSoftMax', 'axisSoftMin'].map((k) => property(k, k, null, true)),
]);

let shot, step;
const interpolate = (e) => e.replace(/\$\{?(\w+)(:\w+)?\}?/g, (whole, name) =>
  ({ job: '.+', instance: '.+', shard_id: '.+', limit: '.+', __rate_interval: '2m' })[name] ?? whole);
const legend = (format, metric) => (format ?? '').replace(/\{\{\s*(\w+)\s*\}\}/g, (_, k) => metric[k] ?? '').trim();

async function ask(path, query) {
  const answer = await (await fetch(`/api/v1/${path}?${new URLSearchParams(query)}`)).json();
  if (answer.status !== 'success') throw new Error(query.query + ': ' + answer.error);
  return answer.data.result;
}

async function frames(target) {
  const query = interpolate(target.expr);
  if (target.instant) {
    const result = await ask('query', { query, time: shot.to });
    return result.map((s) => ({ labels: s.metric, value: Number(s.value[1]), refId: target.refId }));
  }
  const result = await ask('query_range', { query, start: shot.from, end: shot.to, step });
  return result.map((s) => {
    const by = new Map(s.values.map(([at, v]) => [Math.round(at), v]));
    const times = [], values = [];
    for (let at = shot.from; at <= shot.to; at += step) {
      const v = Number(by.get(at));
      times.push(at * 1000);
      values.push(Number.isFinite(v) ? v : null);
    }
    const name = legend(target.legendFormat, s.metric);
    return D.toDataFrame({ refId: target.refId, name, fields: [
      { name: 'Time', type: D.FieldType.time, values: times, config: {} },
      { name: 'Value', type: D.FieldType.number, values, labels: s.metric, config: { displayNameFromDS: name } }] });
  });
}

const range = () => {
  const from = D.dateTime(shot.from * 1000), to = D.dateTime(shot.to * 1000);
  return { from, to, raw: { from, to } };
};

function decorate(data, panel) {
  return D.applyFieldOverrides({
    data, theme, timeZone: 'utc', fieldConfigRegistry: registry, replaceVariables: (s) => s,
    fieldConfig: { overrides: [], ...panel.fieldConfig },
  });
}

const x = (at, left, w) => left + (at - shot.from) / (shot.to - shot.from) * (w - left - 8);

function TimeAxis({ w, h, left }) {
  const ticks = [];
  for (let at = Math.ceil(shot.from / 600) * 600; at <= shot.to; at += 600) ticks.push(at);
  return ticks.map((at) => <text key={at} x={x(at, left, w)} y={h - 4} fontSize="11" textAnchor="middle" fill={theme.colors.text.secondary}>
    {new Date(at * 1000).toISOString().slice(11, 16)}</text>);
}

function Timeline({ data, w, h }) {
  const left = 120, row = (h - 20) / data.length;
  return <svg width={w} height={h}>{data.map((frame, i) => {
    const field = frame.fields[1], values = field.values, times = frame.fields[0].values, bars = [];
    for (let from = 0, k = 1; k <= values.length; k++) {
      if (k < values.length && field.display(values[k]).text === field.display(values[from]).text) continue;
      if (values[from] !== null) bars.push([from, Math.min(k, values.length - 1)]);
      from = k;
    }
    return <g key={i}>
      <text x={4} y={i * row + row / 2 + 4} fill={theme.colors.text.primary} fontSize="12">{D.getFieldDisplayName(field, frame, data)}</text>
      {bars.map(([a, b]) => {
        const shown = field.display(values[a]), at = x(times[a] / 1000, left, w), wide = Math.max(1, x(times[b] / 1000, left, w) - at);
        return <g key={a}><rect x={at} y={i * row + row * 0.08} width={wide} height={row * 0.84} fill={shown.color} opacity="0.85" />
          {wide > 8 * shown.text.length && row > 13 && <text x={at + 6} y={i * row + row / 2 + 4} fontSize="12" fill="#111">{shown.text}</text>}</g>;
      })}</g>;
  })}<TimeAxis w={w} h={h} left={left} /></svg>;
}

function Heat({ data, w, h }) {
  const rows = data.map((f) => [f.fields[1].labels.le === '+Inf' ? Infinity : Number(f.fields[1].labels.le), f.fields[1].values])
    .sort((a, b) => a[0] - b[0]);
  const columns = rows[0][1].length, cells = [];
  let most = 0;
  const grid = rows.map(([, values], r) => values.map((v, c) => {
    const n = Math.max(0, (v ?? 0) - (r ? rows[r - 1][1][c] ?? 0 : 0));
    most = Math.max(most, n);
    return n;
  }));
  const used = grid.map((row) => row.some((n) => n > most / 1e6));
  const low = Math.max(0, used.indexOf(true) - 1), high = Math.min(rows.length - 1, used.lastIndexOf(true) + 1);
  const left = 64, tall = (h - 20) / (high - low + 1), wide = (w - left - 8) / columns;
  const name = (le) => { const v = D.getValueFormat('s')(le); return le === Infinity ? 'more' : v.text + (v.suffix ?? ''); };
  const labels = [];
  for (let r = low; r <= high; r++) {
    const y = h - 20 - (r - low + 1) * tall;
    if ((r - low) % Math.ceil(14 / tall) === 0) labels.push(<text key={r} x={4} y={y + tall / 2 + 4} fontSize="11" fill={theme.colors.text.secondary}>{name(rows[r][0])}</text>);
    grid[r].forEach((n, c) => {
      if (n <= 0) return;
      const part = Math.sqrt(n / most);
      cells.push(<rect key={r + '-' + c} x={left + c * wide} y={y} width={wide + 0.5} height={tall - 1} fill={`hsl(${40 - 30 * part} 90% ${12 + 50 * part}%)`} />);
    });
  }
  return <svg width={w} height={h}>{cells}{labels}<TimeAxis w={w} h={h} left={left} /></svg>;
}

function Table({ rows, panel }) {
  const options = (id) => panel.transformations.find((t) => t.id === id).options;
  const columns = options('filterFieldsByName').include.names, names = options('organize').renameByName;
  const units = Object.fromEntries(panel.fieldConfig.overrides.map((o) => [o.matcher.options, o.properties.find((p) => p.id === 'unit')?.value]));
  const merged = new Map();
  for (const r of rows) {
    const key = JSON.stringify(Object.entries(r.labels).sort());
    merged.set(key, { ...r.labels, ...merged.get(key), [panel.targets.length > 1 ? 'Value #' + r.refId : 'Value']: r.value });
  }
  const text = (column, v) => {
    if (v === undefined) return '';
    const unit = units[names[column]];
    if (!unit || typeof v !== 'number') return String(v);
    return D.formattedValueToString(D.getValueFormat(unit)(v));
  };
  const cell = { padding: '5px 10px', textAlign: 'left', borderBottom: '1px solid ' + theme.colors.border.weak, fontSize: 13 };
  return <table style={{ borderCollapse: 'collapse', width: '100%' }}><thead><tr>{columns.map((c) =>
    <th key={c} style={{ ...cell, color: theme.colors.text.link }}>{names[c]}</th>)}</tr></thead>
  <tbody>{[...merged.values()].map((r, i) => <tr key={i}>{columns.map((c) => <td key={c} style={cell}>{text(c, r[c])}</td>)}</tr>)}</tbody></table>;
}

function Body({ panel, data, w, h }) {
  if (!data.length) {
    return <div style={{ padding: 12, color: theme.colors.text.secondary, textAlign: 'center' }}>{panel.fieldConfig.defaults.noValue}</div>;
  }
  switch (panel.type) {
    case 'stat': {
      const values = D.getFieldDisplayValues({
        fieldConfig: panel.fieldConfig, reduceOptions: panel.options.reduceOptions, replaceVariables: (s) => s, theme, data, timeZone: 'utc', sparkline: true,
      });
      const each = h / values.length;
      return <div>{values.map((v, i) => <UI.BigValue key={i} theme={theme} width={w} height={each - 4} value={v.display} sparkline={v.sparkline}
        graphMode={panel.options.graphMode} colorMode={panel.options.colorMode} textMode={panel.options.textMode} justifyMode="auto" />)}</div>;
    }
    case 'timeseries':
      return <UI.TimeSeries frames={data} structureRev={1} width={w} height={h} timeRange={range()} timeZone="utc"
        legend={panel.options.legend} options={panel.options} />;
    case 'state-timeline': return <Timeline data={data} w={w} h={h} />;
    case 'heatmap': return <Heat data={data} w={w} h={h} />;
  }
  throw new Error('panel type ' + panel.type);
}

function Panel({ panel }) {
  const [data, setData] = React.useState(null), [error, setError] = React.useState(null);
  React.useEffect(() => {
    (async () => {
      try {
        const all = (await Promise.all(panel.targets.map(frames))).flat();
        setData(panel.type === 'table' ? all : decorate(all, panel));
      } catch (e) {
        setError(String(e));
        console.log('ERR', panel.title, e.stack);
      }
      window.drawn = (window.drawn ?? 0) + 1;
    })();
  }, []);
  const g = panel.gridPos, w = g.w / 24 * width - 8, h = g.h * unitHeight - 8;
  return <div style={{ position: 'absolute', left: g.x / 24 * width + 4, top: head + g.y * unitHeight + 4 }}>
    <UI.PanelChrome title={panel.title} description={panel.description} width={w} height={h} statusMessage={error}>
      {(innerWidth, innerHeight) => data && <UI.PanelContextProvider value={{ eventsScope: 'x', eventBus: new D.EventBusSrv() }}>
        {panel.type === 'table' ? <Table rows={data} panel={panel} /> : <Body panel={panel} data={data} w={innerWidth} h={innerHeight} />}
      </UI.PanelContextProvider>}
    </UI.PanelChrome></div>;
}

function Dashboard({ d }) {
  const all = d.panels.flatMap((p) => [p, ...(p.panels ?? [])]);
  window.panels = all.filter((p) => p.type !== 'row').length;
  window.height = head + Math.max(...all.map((p) => p.gridPos.y + p.gridPos.h)) * unitHeight + 8;
  const hour = (at) => new Date(at * 1000).toISOString().slice(11, 16);
  return <div style={{ position: 'relative', width, height: window.height, background: theme.colors.background.canvas, color: theme.colors.text.primary, fontFamily: theme.typography.fontFamily }}>
    <div style={{ position: 'absolute', left: 8, top: 10, fontSize: 18 }}>{d.title}
      <span style={{ fontSize: 14, color: theme.colors.text.secondary, marginLeft: 12 }}>{shot.title}, {hour(shot.from)} to {hour(shot.to)} UTC</span></div>
    {all.map((p) => p.type === 'row'
      ? <div key={p.id} style={{ position: 'absolute', left: 8, top: head + p.gridPos.y * unitHeight + 8, fontWeight: 600 }}>▾ {p.title}</div>
      : <Panel key={p.id} panel={p} />)}</div>;
}

(async () => {
  shot = await (await fetch('/shot.json')).json();
  step = (shot.to - shot.from) / 120;
  createRoot(document.getElementById('root')).render(
    <ThemeContext.Provider value={theme}><UI.GlobalStyles /><Dashboard d={shot.dashboard} /></ThemeContext.Provider>);
})();

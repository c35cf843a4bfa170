"""Texts for the benchmark of sparse attention, written for it: a German story, an English account.

The towns and people do not exist. The story has about 3,700 tokens of SmolLM2, whose vocabulary
was made for English; nothing that is installed with the product holds a longer text in a language
other than English. The account goes with the demo's handbook. Licence: that of the project.
"""

from __future__ import annotations

from typing import Final

FOUNDING: Final = """\
Chapter: How the company began
The company owes its beginning to a storm, a debt and a stubborn woman. In the winter of 1921 the \
mail boat to Callow Island was lost with everything in her hold, and for eleven weeks nothing came \
to the island but what two brothers could carry in an open boat. The elder of them, Edmund Vane, \
had borrowed the boat from a neighbour and paid for it with a share of every sack of flour. When \
spring came he had made nineteen crossings, lost three fingers to the frost, and owed nobody \
anything. The harbour board offered him the mail contract. He had no ship that could hold it. His \
grandmother, Annis Vane, who was seventy-nine and had never been to sea, sold the house in which \
she had been born, moved into two rooms above the chandler's, and gave him the money in a biscuit \
tin. She made one condition: the boat was to sail on the hour that was written on the board, \
whether there were forty passengers or none, because people who cannot trust a timetable will not \
leave home. That sentence hangs in every wheelhouse of the company to this day.
The first ship was a steam drifter of thirty-one years, bought cheaply because her boiler had been \
condemned. Edmund and his brother Tom rebuilt it in a shed with the help of a schoolmaster who had \
read about boilers and a blacksmith who had not. She sailed on the first of June 1922 with four \
passengers, a cow and the mail, and arrived six minutes late, for which Annis Vane, who waited \
on the quay with a watch, fined her grandson a shilling. The shilling was nailed to the mast. In \
the second year there were two sailings a day, in the fifth a second ship. Tom Vane left the \
company in 1930 after a quarrel about engines: he wanted diesel, his brother wanted coal, and each \
of them was right for about ten years. They did not speak until the evacuation of Sundry in the \
flood of 1938, when Tom came round the point in a borrowed tug, took the line that Edmund threw \
him, and towed the powerless Grey Goose and her two hundred passengers off the rocks. Nobody heard \
what they said to each other on the quay afterwards. The next ship had diesel engines."""

CLOCKMAKER: Final = """\
Die Uhren von Hallwede

In der kleinen Stadt Hallwede, die zwischen zwei Hügeln am Ufer der Senne liegt, gab es vor langer \
Zeit einen Uhrmacher, der Konrad Ehlers hieß. Seine Werkstatt lag in der Brunnengasse, gegenüber \
der alten Waage, und wer an ihrem Fenster vorbeiging, der hörte schon von weitem das Ticken. Es \
war kein gleichmäßiges Ticken, sondern ein vielstimmiges Gemurmel, denn in der Werkstatt hingen \
mehr als achtzig Uhren, und keine zwei von ihnen gingen im selben Takt. Konrad Ehlers störte das \
nicht. Er sagte, eine Uhr müsse sich erst an ihr Haus gewöhnen, bevor man ihr die richtige Zeit \
abverlangen dürfe, und so ließ er jede neue Uhr sieben Wochen lang gehen, wie sie wollte.

Der Uhrmacher hatte eine Tochter, die Lisbeth hieß und elf Jahre alt war, als diese Geschichte \
beginnt. Sie konnte eine Taschenuhr schneller zerlegen als mancher Geselle, und sie wusste von \
jedem Rädchen, wohin es gehörte. Am liebsten aber saß sie auf der Treppe vor dem Haus und zählte \
die Fuhrwerke, die über die Brücke in die Stadt kamen. Sie schrieb die Zahl eines jeden Tages in \
ein blaues Heft: am Montag zweiundvierzig, am Dienstag achtunddreißig, am Mittwoch, wenn Markt \
war, einhundertsieben. Ihr Vater fragte sie einmal, wozu sie das tue. Sie antwortete, dass man \
erst wissen könne, was sich verändert, wenn man wisse, wie es vorher war. Darauf wusste er nichts \
zu erwidern, und er schenkte ihr am nächsten Tag ein zweites Heft.

Im Herbst jenes Jahres blieb die große Uhr am Rathaus stehen. Es geschah in der Nacht zum vierten \
Oktober, um siebzehn Minuten nach zwei, und niemand bemerkte es bis zum Morgen, weil in Hallwede \
um diese Zeit alle schliefen. Als die Bäckerin Frau Wendel um fünf Uhr ihren Laden öffnen wollte, \
sah sie zum Turm hinauf und glaubte, sie sei drei Stunden zu früh aufgestanden. Sie legte sich \
wieder hin, und so kam es, dass an diesem Tag niemand in der Stadt frisches Brot bekam. Der Lehrer \
wartete vergeblich auf seine Schüler, die Schüler warteten vergeblich auf die Glocke, und der \
Fährmann fuhr erst gegen Mittag über den Fluss, als ihm der Hunger sagte, dass etwas nicht stimmen \
konnte.

Der Bürgermeister, ein Herr namens Friedrich Tolle, ließ sogleich nach Konrad Ehlers schicken. Der \
Uhrmacher stieg die hundertzwölf Stufen des Turmes hinauf, und Lisbeth trug ihm die Tasche mit dem \
Werkzeug nach. Oben war es kalt, und der Wind pfiff durch die Ritzen der Läden. Das Uhrwerk war so \
hoch wie ein Mann und so breit wie ein Bett. Es hatte drei Walzen, von denen die eine das Gehwerk \
trieb, die zweite den Viertelschlag und die dritte den Stundenschlag. Konrad Ehlers ging einmal um \
das Werk herum, legte die Hand auf das große Rad und schwieg. Dann sagte er, es sei nichts \
gebrochen, nichts verrostet und nichts verstellt. Die Uhr könne gehen, aber sie wolle nicht.

Der Bürgermeister war ein Mann, der für alles einen Grund haben wollte, und mit dieser Auskunft \
war er nicht zufrieden. Er schrieb einen Brief an den berühmten Meister Anselm Roth in der \
Hauptstadt und bat ihn, die Uhr von Hallwede anzusehen. Nach neun Tagen kam der Meister mit einer \
Kutsche, zwei Gehilfen und vier Kisten voller Instrumente. Er maß die Zähne der Räder, er wog die \
Gewichte, er prüfte das Pendel und die Hemmung. Am dritten Abend setzte er sich im Gasthaus Zum \
Goldenen Anker an den Tisch und erklärte, das Pendel sei um vier Linien zu lang. Es wurde gekürzt, \
und die Uhr ging eine Stunde lang. Dann blieb sie wieder stehen, um siebzehn Minuten nach zwei, \
obwohl es in Wahrheit halb fünf am Nachmittag war, denn die Zeiger waren von selbst dorthin \
zurückgekehrt. Meister Roth packte seine Kisten, verlangte dreißig Taler und reiste ab.

Lisbeth hatte alles mit angesehen und in ihr Heft geschrieben. Am Abend las sie ihrem Vater vor, \
was darin stand. Am ersten Oktober waren neununddreißig Fuhrwerke über die Brücke gekommen, am \
zweiten einundvierzig, am dritten nur zwölf. Am vierten, dem Tag, an dem die Uhr stehen blieb, war \
kein einziges gekommen. Seitdem zählte sie jeden Tag weniger als zehn. Der Uhrmacher legte die \
Feile beiseite und dachte nach. Er kannte die Brücke gut, denn sein Großvater hatte an ihr \
mitgebaut. Sie ruhte auf vier Pfeilern, und von dem zweiten Pfeiler, das wusste er aus alten \
Papieren, führte ein gemauerter Gang bis unter das Rathaus. Durch diesen Gang lief früher das \
Wasser, das die Mühle im Keller getrieben hatte. Die Mühle gab es seit sechzig Jahren nicht mehr, \
aber der Gang war noch da.

Am nächsten Morgen nahmen sie eine Laterne und ein langes Seil und gingen zum Fluss hinunter. Der \
Fährmann, der Jakob Brandt hieß und mit dem Uhrmacher befreundet war, ruderte sie zu dem zweiten \
Pfeiler. Dort fanden sie eine eiserne Tür, die so verrostet war, dass man sie mit einem Balken \
aufbrechen musste. Dahinter lag der Gang. Das Wasser stand ihnen bis zu den Knien, und es floss, \
obwohl es hätte stehen müssen. Jakob Brandt hielt die Laterne hoch, und da sahen sie, dass auf der \
linken Seite ein Stück der Mauer eingestürzt war. Durch das Loch drückte der Fluss herein, und mit \
jedem Wagen, der oben über die Brücke rollte, bröckelten weitere Steine herab. Die Fuhrleute \
hatten das Zittern bemerkt, schon Tage zuvor, und sie hatten den weiten Weg über die Furt bei \
Odenrode genommen. Gesagt hatten sie es niemandem, weil jeder dachte, die anderen wüssten es.

Nun verstand Konrad Ehlers auch, was mit der Uhr geschehen war. Der Turm des Rathauses stand auf \
denselben Pfählen wie die alte Mühle, und das Wasser hatte den Boden unter ihnen ausgespült. Der \
Turm hatte sich geneigt, nicht so viel, dass man es von der Straße aus sehen konnte, aber genug \
für ein Pendel. Ein Pendel, so erklärte er seiner Tochter, ist das ehrlichste Ding der Welt. Es \
hängt immer genau nach unten, und wenn das Haus sich neigt, dann neigt es sich nicht mit. Die \
Gabel, die das Pendel hält, war mit dem Turm zur Seite gewandert, und in einer bestimmten Stellung \
der Räder stieß das eine an das andere. Diese Stellung war siebzehn Minuten nach zwei.

Der Bürgermeister wollte es zuerst nicht glauben. Er ließ ein Lot von der Spitze des Turmes \
hängen, und das Lot traf das Pflaster eine Handbreit neben dem Stein, auf den es bei der \
Einweihung gezeigt hatte. Da wurde er blass. Er ließ die Brücke sperren und die Schule räumen, die \
gleich neben dem Rathaus lag, und er rief alle Maurer und Zimmerleute der Gegend zusammen. Sie \
kamen aus Odenrode, aus Silberhude und sogar aus dem fernen Marlow. Sechs Wochen lang arbeiteten \
sie an dem Gang und an den Fundamenten. Sie schlugen zweihundert neue Pfähle aus Eichenholz ein, \
sie mauerten das Loch zu, und sie füllten den Gang mit Steinen und Kalk. Es kostete die Stadt \
viertausend Taler, die sie nicht hatte, und darum verkaufte der Bürgermeister seine beiden \
Kutschpferde und ging von da an zu Fuß.

Am achtzehnten November war alles fertig. Der Turm stand noch immer ein wenig schief, denn gerade \
richten konnte man ihn nicht mehr, aber er bewegte sich nicht weiter. Konrad Ehlers stieg hinauf \
und versetzte die Gabel des Pendels um die Breite eines Daumens. Dann gab er dem Pendel einen \
leichten Stoß. Die Uhr begann zu gehen, und als sie zum ersten Mal wieder schlug, liefen die Leute \
auf den Markt und nahmen die Hüte ab. Frau Wendel verschenkte an diesem Tag alle Brote, die sie \
gebacken hatte, und der Lehrer ließ die Schule ausfallen, obwohl er jetzt wieder wusste, wann sie \
beginnen sollte.

Man wollte den Uhrmacher belohnen, aber er sagte, nicht er habe den Schaden gefunden, sondern \
seine Tochter mit ihrem blauen Heft. Da fragte der Bürgermeister Lisbeth, was sie sich wünsche. \
Sie überlegte lange. Dann bat sie darum, dass an der Brücke eine Tafel angebracht werde, auf die \
jeden Abend geschrieben werden sollte, wie viele Wagen gekommen waren, und dass jeder, der etwas \
Ungewöhnliches bemerke, es auf die Rückseite schreiben dürfe. So geschah es. Die Tafel hing dort \
hundert Jahre lang. Auf ihrer Vorderseite standen die Zahlen, und auf ihrer Rückseite stand meist \
nichts, manchmal ein Scherz und zwei oder drei Mal etwas, das die Stadt vor einem Unglück bewahrte.

Lisbeth Ehlers wurde später selbst Uhrmacherin, die erste, von der man in dieser Gegend weiß. Sie \
baute eine Uhr, die nicht nur die Stunde anzeigte, sondern auch den Stand des Wassers, die \
Richtung des Windes und die Neigung des Turmes, auf dem sie stand. Als sie alt war, besuchte sie \
ein junger Mann aus der Hauptstadt, der ein Enkel jenes Meisters Roth war, und fragte sie, worin \
die Kunst ihres Handwerks bestehe. Sie führte ihn an das Fenster der Werkstatt, in der noch immer \
mehr als achtzig Uhren tickten, und sagte: Die meisten Leute sehen auf die Uhr, um zu wissen, wie \
spät es ist. Wir aber müssen auf die Zeit sehen, um zu wissen, wie es der Uhr geht. Der junge Mann \
schrieb sich das auf. Dann fragte er, welche von den Uhren die richtige Zeit zeige. Lisbeth \
lachte und zeigte auf eine kleine Uhr aus Messing, die über der Tür hing und stand. Diese dort, \
sagte sie, zeigt siebzehn Minuten nach zwei, und zweimal am Tag ist sie die genaueste von allen.

Heute ist die Werkstatt ein Museum. Wer es besucht, der bezahlt zwei Mark Eintritt und bekommt am \
Eingang ein blaues Heft geschenkt, das leer ist bis auf die erste Seite. Dort steht, in der \
Handschrift eines elfjährigen Mädchens: Montag, der vierte Oktober. Kein Wagen. Warum? Die Führung \
beginnt jeden Nachmittag um drei Uhr und dauert ungefähr fünfzig Minuten. Zuerst sieht man die \
Stube mit dem Werktisch, dann die Kammer, in der die Gesellen schliefen, und zuletzt den Hof, in \
dem das alte Pendel der Rathausuhr an einem eisernen Gestell hängt. Es schwingt nicht mehr, aber \
es zeigt noch immer genau nach unten, und neben ihm hat man einen Strich auf die Mauer gezogen, \
der einmal gerade war. Der Strich und das Pendel bilden einen kleinen Winkel. Er ist in den \
letzten vierzig Jahren nicht größer geworden, sagt der Wärter, und er misst ihn jeden Morgen nach, \
bevor er die Tür aufschließt.
"""
